"""The report as one page of HTML: nothing is fetched, every figure and script is in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from stillhouse.config import to_yaml
from stillhouse.runs.directory import differences
from stillhouse.study.analysis import Analysis, Row, split_of
from stillhouse.study.plan import Cell
from stillhouse.study.report import figures, tables, words
from stillhouse.study.report.tables import Column, Table


def page(analysis: Analysis) -> str:
    """The whole page."""
    plan = analysis.plan
    parts = [
        _head(analysis),
        *(_pair(analysis, place, pair) for place, pair in enumerate(plan.pairs)),
        _ranks(analysis),
        _tuning(analysis),
        _failures(analysis),
        _provenance(analysis),
        _reading(analysis),
    ]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in _contents(analysis))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(plan.name)}: {escape(plan.question)}</title>\n<style>\n{_asset('style.css')}</style>\n</head>\n<body>\n"
        f'<nav><strong>{escape(plan.name)}</strong>{links}<button id="theme" type="button" title="light or dark">◐</button></nav>\n'
        f"<main>\n{''.join(parts)}</main>\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("stillhouse.study.report") / name).read_text(encoding="utf-8")


def _contents(analysis: Analysis) -> list[tuple[str, str]]:
    listed = [(f"pair{place}", pair) for place, pair in enumerate(analysis.plan.pairs)]
    if analysis.rankings:
        listed.append(("ranks", "Ranks"))
    if analysis.plan.tuned:
        listed.append(("tuning", "Tuning"))
    if words.failures(analysis):
        listed.append(("failed", "Not run"))
    return [*listed, ("provenance", "Provenance"), ("reading", "How to read this")]


def _head(analysis: Analysis) -> str:
    plan = analysis.plan
    notes = "".join(f'<p class="note">{escape(remark)}</p>' for remark in analysis.remarks)
    if not analysis.complete:
        notes = f'<p class="note">Not finished: some cells have not run yet.</p>{notes}'
    return (
        f"<header><p class=kicker>A comparison study</p><h1>{escape(plan.question)}</h1>"
        f'<p class="lead">{escape(words.summary(plan))}.</p>{notes}</header>\n'
    )


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _pair(analysis: Analysis, place: int, pair: str) -> str:
    plan, rows = analysis.plan, analysis.rows[pair]
    facts = next((row.entry.facts for row in rows if row.entry.facts.teacher_scores), rows[0].entry.facts)
    given = rows[0].entry.given
    models = ", ".join(
        f"{role} {escape(_named(given.get(role)))}"
        for role in ("task", "teacher", "student")
        if given.get(role)
    )
    teacher = facts.teacher_scores.get(facts.metric)
    known = "" if teacher is None else f"; the teacher's validation {escape(facts.metric)} is {teacher:.3f}"
    sentences = "".join(
        f'<li class="{_verdict(plan.baseline, row)}"><b>{escape(row.title)}</b>{escape(words.sentence(plan, row)[len(row.title) :])}</li>'
        for row in rows
    )
    shown = [
        (
            "Scores",
            "the mean and its 95 % interval, a dot for each seed",
            _when(figures.intervals, rows, plan.baseline),
        ),
        ("Learning", "validation over the updates, mean and 95 % band", _when(figures.curves, rows)),
        (
            "Quality against cost",
            f"{split_of(rows)} score by seconds of training",
            _when(figures.costs, rows),
        ),
    ]
    if plan.tuned:
        about = "each setting tried; filled: chosen, square: as given"
        shown.append(("Tuning", about, _when(figures.tuning, rows)))
    drawn = "".join(
        f"<figure><figcaption><b>{title}</b> {escape(about)}</figcaption>{make(f'p{place}f{at}')}</figure>"
        for at, (title, about, make) in enumerate(shown)
        if any(row.scores for row in rows)
    )
    return (
        f'<section id="pair{place}" class="pair"><h2>{escape(pair)}</h2><p class="about">{_capital(models)}{known}.</p>'
        f"<ul class=answers>{sentences}</ul>{_legend(rows)}{_table(analysis, tables.scores(analysis, pair), kind='scores')}"
        f'<div class="figures">{drawn}</div>{_costs(analysis, pair)}</section>\n'
    )


def _when(draw: Callable[..., str], rows: Sequence[Row], *more: Any) -> Callable[[str], str]:
    return lambda name: draw(rows, *more, name)


def _named(spec: Any) -> str:
    if not isinstance(spec, Mapping):
        return str(spec)
    rest = {key: value for key, value in spec.items() if key != "name" and value not in ({}, None)}
    told = ", ".join(f"{key} {words.plain(value)}" for key, value in rest.items())
    return f"{spec['name'] or 'by default'}{f' ({told})' if told else ''}"


def _verdict(baseline: str, row: Row) -> str:
    if row.interval is None:
        return "none"
    if row.entry.method == baseline:
        return "base"
    return (row.difference.verdict if row.difference else None) or "open"


def _legend(rows: Sequence[Row]) -> str:
    chips = "".join(
        f'<button type="button" data-method="m{place}" aria-pressed="false">{_swatch(place)}'
        f"{escape(row.title)}</button>"
        for place, row in enumerate(rows)
        if row.scores
    )
    return f'<div class="legend" title="click to show one method">{chips}</div>'


def _table(analysis: Analysis, table: Table, *, kind: str = "") -> str:
    """A table that a click on a head sorts."""
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(str(column.head))}</button></th>'
        for column in table.shown
    )
    body = "".join(
        "<tr>" + "".join(_cell(analysis, column, item) for column in table.shown) + "</tr>"
        for item in table.items
    )
    return f'<div class="scroll"><table class="sortable {kind}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(analysis: Analysis, column: Column, item: Any) -> str:
    order = column.order(item)
    by = order.lower() if isinstance(order, str) else order
    return f'<td data-sort="{"" if by is None else escape(str(by))}">{_dressed(analysis, column, item)}</td>'


def _dressed(analysis: Analysis, column: Column, item: Any) -> str:
    """The cell's words, set off as its column asks."""
    told = escape(column.text(item))
    if column.value(item) is None:
        return f'<span class="none">{told}</span>'
    mean, sign, half = told.partition(" ± ")
    spread = f" <small>± {half}</small>" if sign else ""
    match column.dress:
        case "method":
            return f"{_swatch(list(analysis.plan.titles).index(item.method))}{told}"
        case "mean":
            return f"<b>{mean}</b>{spread}"
        case "difference":
            return f'<span class="chip {item.difference.verdict or "open"}">{mean}{spread}</span>'
        case "code":
            return f"<code>{told}</code>"
    return told


def _swatch(place: int) -> str:
    return f'<i style="background:var(--m{place % figures.COLOURS})"></i>'


def _costs(analysis: Analysis, pair: str) -> str:
    made = tables.costs(analysis, pair)
    return f"<h3>What it cost</h3>{_table(analysis, made)}" if made.items else ""


def _ranks(analysis: Analysis) -> str:
    if not analysis.rankings:
        return ""
    blocks = []
    for place, ranking in enumerate(analysis.rankings):
        drawn = (
            f'<figure class="wide">{figures.ranks(analysis, ranking, f"ranks{place}")}</figure>'
            if ranking.ranks.different
            else ""
        )
        title = "Over the pairs" if ranking.pair is None else f"On {ranking.pair}"
        told = escape(words.rank_words(analysis, ranking))
        blocks.append(
            f"<h3>{escape(title)}</h3><p>{told}</p>{drawn}{_table(analysis, tables.ranks(analysis, ranking))}"
        )
    return f'<section id="ranks"><h2>Ranks</h2>{"".join(blocks)}</section>\n'


def _tuning(analysis: Analysis) -> str:
    if not analysis.plan.tuned:
        return ""
    chosen = _table(analysis, tables.chosen(analysis), kind="words")
    tried = tables.tried(analysis)
    return (
        f'<section id="tuning"><h2>What was tuned, and how</h2>{chosen}<details><summary>Every setting tried '
        f"<small>{len(tried.items)}</small></summary>{_table(analysis, tried, kind='words')}</details></section>\n"
    )


def _failures(analysis: Analysis) -> str:
    told = words.failures(analysis)
    if not told:
        return ""
    listed = "".join(f"<dt>{escape(who)}</dt><dd>{escape(why)}</dd>" for who, why in told)
    return f'<section id="failed"><h2>What did not run</h2><dl>{listed}</dl></section>\n'


def _provenance(analysis: Analysis) -> str:
    cells: dict[tuple[str, str], list[tuple[Cell, Mapping[str, Any] | None]]] = {}
    for one, found in analysis.provenance:
        cells.setdefault((one.method, one.pair), []).append((one, found))
    blocks = "".join(_entry(analysis, row, cells.get((row.entry.method, pair), []))
                     for pair, rows in analysis.rows.items() for row in rows if row.entry.facts.refused is None)  # fmt: skip
    return (
        '<section id="provenance"><h2>Provenance</h2><p>What made every cell: the settings passed, the settings in force, '
        f"versions, fingerprints, seeds, machine, time.</p>{blocks}</section>\n"
    )


def _entry(analysis: Analysis, row: Row, cells: Sequence[tuple[Cell, Mapping[str, Any] | None]]) -> str:
    entry = row.entry
    trial = entry.trials[row.chosen or 0]
    passed = to_yaml({**entry.given, **({"chosen on validation": trial.settings} if trial.settings else {})})
    done = next((found for one, found in cells if found is not None and found["status"] == "done"), None)
    chosen = {name: item["value"] for name, item in (done or {}).get("chosen", {}).items()}
    in_force = to_yaml({**trial.config, **({"chosen by the run": chosen} if chosen else {})})
    origin = {
        "data": entry.facts.data,
        "teacher": entry.facts.teacher,
        "code": entry.origin.code,
        "device and threads": entry.origin.machine,
        "versions": {**entry.versions, **(done or {}).get("versions", {})},
        **{key: done[key] for key in ("plugins", "machine", "kernel", "git") if done},
    }
    metric = entry.facts.metric
    ran = tables.Table(
        tables.RUNS, [tables.Ran(one, found, metric, _apart(found, done)) for one, found in cells]
    )
    return (
        f"<details><summary>{escape(row.title)} <small>on {escape(entry.pair)}, {len(cells)} cells</small></summary>"
        f'<div class="columns"><div><h4>Settings passed</h4><pre>{escape(passed)}</pre></div>'
        f"<div><h4>Settings in force</h4><pre>{escape(in_force)}</pre></div>"
        f"<div><h4>Made from</h4><pre>{escape(to_yaml(origin))}</pre></div></div>{_table(analysis, ran)}</details>"
    )


def _apart(found: Mapping[str, Any] | None, first: Mapping[str, Any] | None) -> str:
    """Where a cell's machine or versions are not those that stand above its table."""
    if not found or not first or found["status"] != "done":
        return ""
    keys = ("versions", "plugins", "machine", "kernel")
    told = differences({key: first[key] for key in keys}, {key: found[key] for key in keys})
    return "; ".join(f"{path}: {json.dumps(its)}" for path, _, its in told)


def _reading(analysis: Analysis) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in words.reading(analysis))
    remarks = "".join(f"<p>{escape(note)}</p>" for note in words.notes(analysis))
    return f'<section id="reading"><h2>How to read this</h2>{lines}{remarks}</section>\n'
