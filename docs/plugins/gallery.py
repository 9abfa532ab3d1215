"""Writes the table of gallery.md from the installed plugins: ``python docs/plugins/gallery.py``."""

# ruff: noqa: INP001

from __future__ import annotations

from pathlib import Path

from stillhouse.plugin import catalog
from stillhouse.plugin.describe import describe

PAGE = Path(__file__).with_name("gallery.md")
START, END = "<!-- made by gallery.py -->\n", "<!-- end -->\n"


def table() -> str:
    """One row for each method that Stillhouse brings: what it implements, with which arguments, and needs."""
    rows = ["| method | hooks | requires | what it is |", "| --- | --- | --- | --- |"]
    for entry in catalog.entries("method"):
        if entry.distribution != catalog.OWN:
            continue
        facts = describe(entry)
        hooks = "<br>".join(f"`{hook['name']}({', '.join(hook['arguments'])})`" for hook in facts["hooks"])
        summary = facts["summary"].replace("|", "\\|")
        rows.append(f"| `{entry.name}` | {hooks} | {', '.join(facts['requires']) or 'nothing'} | {summary} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The page with a table of the present."""
    before, _, rest = PAGE.read_text().partition(START)
    return f"{before}{START}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
