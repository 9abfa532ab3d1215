"""``stillhouse plugins``: list, new, show, check. Listing and new import no plugin, no torch and no pydantic."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

from stillhouse.errors import PluginError
from stillhouse.plugin import catalog


def run(options: argparse.Namespace) -> int:
    """The verb that was asked for; without one, the list."""
    verbs = {None: list_all, "new": new, "show": show, "check": check}
    return verbs[options.plugins_command](options)


def list_all(options: argparse.Namespace) -> int:
    """List the installed plugins from their metadata."""
    listed = catalog.entries()
    if options.json:
        print(json.dumps([entry.as_dict() for entry in listed], indent=2))
        return 0
    rows = [("kind", "name", "distribution", "from")]
    for entry in listed:
        rows.append((entry.kind, entry.name, f"{entry.distribution} {entry.version}", entry.value))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for (kind, name), claims in catalog.duplicates(listed).items():
        who = " and ".join(claim.distribution for claim in claims)
        print(f"note: {kind} '{name}' is claimed by {who}; a config that names it is refused")
    return 0


def new(options: argparse.Namespace) -> int:
    """Write a package with a plugin that works."""
    from stillhouse.scaffold import Names, write

    names = Names.of(options.name, options.kind)
    for entry in catalog.entries(options.kind):
        if entry.name == names.name:
            raise PluginError(f"there is a {entry} already; choose another name, for a name may stand once")
    if importlib.util.find_spec(names.module) is not None:
        raise PluginError(
            f"the module {names.module} of plugin '{names.name}' is installed already, and its files would stand in "
            f"one another's place; choose another name, as in 'my-{names.name}'"
        )
    folder = Path(options.dir or names.distribution)
    files = write(names, folder)
    if options.json:
        print(
            json.dumps(
                {**asdict(names), "dir": str(folder), "files": [str(path) for path in files]}, indent=2
            )
        )
        return 0
    for path in files:
        print(path)
    print(f"next: pip install -e {folder} && stillhouse plugins check {names.name}")
    return 0


def show(options: argparse.Namespace) -> int:
    """Print what a plugin implements, requires and can be told."""
    entry = _named(options)
    from stillhouse.plugin.describe import describe, text

    facts = describe(entry)
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


def check(options: argparse.Namespace) -> int:
    """Run the conformance checks; 1 where the plugin has to be mended."""
    entry = _named(options)
    if entry.kind == "model":
        raise PluginError(f"{entry}: a model builder has no checks of its own; check the task that offers it")
    from stillhouse.plugin.load import loaded
    from stillhouse.testing import checks_for, outcomes, subject_of

    kind = loaded(entry)
    subject = subject_of(kind, entry=entry)
    done = []
    for outcome in outcomes(checks_for(subject)):
        done.append(outcome)
        if not options.json:
            line = f"{outcome.status:10} {outcome.check.name}"
            print(f"{line}: {outcome.message}" if outcome.message else line, flush=True)
    bad = [outcome for outcome in done if outcome.bad]
    if options.json:
        rows = [
            {"check": o.check.name, "about": o.check.about, "status": o.status, "message": o.message}
            for o in done
        ]
        print(json.dumps({**entry.as_dict(), "passed": not bad, "checks": rows}, indent=2))
    else:
        print(f"{entry}: {len(done) - len(bad)} of {len(done)} as they should be")
    return 1 if bad else 0


def _named(options: argparse.Namespace) -> catalog.Entry:
    """The entry of that name, of whatever kind."""
    if options.kind is not None:
        return catalog.find(options.kind, options.name)
    found = [entry for entry in catalog.entries() if entry.name == options.name]
    kinds = sorted({entry.kind for entry in found})
    if len(kinds) > 1:
        raise PluginError(
            f"several plugins are called '{options.name}': {' and '.join(kinds)}; say which with --kind"
        )
    if not kinds:
        raise catalog.unknown("plugin", options.name, catalog.entries())
    return catalog.find(kinds[0], options.name)
