"""The report as one page of HTML: nothing is fetched, every figure and script is in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from stillhouse.config import to_yaml
from stillhouse.runs.directory import differences
from stillhouse.study.analysis import Analysis, Row
from stillhouse.study.plan import Cell, score
from stillhouse.study.report import figures, text, words
from stillhouse.study.report.words import NONE, number


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
    if analysis.ranks is not None:
        listed.append(("ranks", "Ranks"))
    if analysis.plan.tuned:
        listed.append(("tuning", "Tuning"))
    if _told_failures(analysis):
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
        ("Quality against cost", "test score by seconds of training", _when(figures.costs, rows)),
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
        f"<ul class=answers>{sentences}</ul>{_legend(rows)}{_score_table(analysis, rows)}"
        f'<div class="figures">{drawn}</div>{_cost_table(rows)}</section>\n'
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
        f'<button type="button" data-method="m{place}" aria-pressed="false"><i style="background:var(--m{place % figures.COLOURS})"></i>'
        f"{escape(row.title)}</button>"
        for place, row in enumerate(rows)
        if row.scores
    )
    return f'<div class="legend" title="click to show one method">{chips}</div>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[tuple[str, float | str | None]]], *, kind: str = ""
) -> str:
    """A sortable table; each cell has its HTML and what it is sorted by (None goes last)."""
    heads = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-sort="{"" if by is None else escape(str(by))}">{html}</td>' for html, by in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="sortable {kind}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _method(place: int, row: Row) -> tuple[str, str]:
    swatch = f'<i style="background:var(--m{place % figures.COLOURS})"></i>'
    return f"{swatch}{escape(row.title)}", row.title.lower()


def _score_table(analysis: Analysis, rows: Sequence[Row]) -> str:
    plan = analysis.plan
    metric = next((row.entry.facts.metric for row in rows if row.scores), "score")
    base = escape(plan.titles[plan.baseline])
    head = ["method", f"test {escape(metric)}", "BCa interval", "IQM", f"to {base}", "p (Holm)", "permutation",
            "Wilcoxon", "effect", "P(better)", "seeds needed"]  # fmt: skip
    return table(head, [_score_cells(analysis, place, row) for place, row in enumerate(rows)], kind="scores")


def _score_cells(analysis: Analysis, place: int, row: Row) -> list[tuple[str, float | str | None]]:
    if row.interval is None:
        return [_method(place, row), (f'<span class="none">{row.status}</span>', None), *[(NONE, None)] * 9]
    low = NONE if row.bca is None else f"{row.bca[0]:.3f} to {row.bca[1]:.3f}"
    cells: list[tuple[str, float | str | None]] = [
        _method(place, row),
        (f"<b>{row.interval.mean:.3f}</b>{_half(row.interval.half)}", row.interval.mean),
        (low, None if row.bca is None else row.bca[0]),
        (f"{row.interquartile:.3f}", row.interquartile),
    ]
    one = row.difference
    if one is None:
        return [*cells, *[(NONE, None)] * 7]
    verdict = one.verdict or "open"
    gap = f'<span class="chip {verdict}">{one.interval.mean:+.3f}{_half(one.interval.half)}</span>'
    tests = [(number(p), p) for p in (one.p_holm, one.p_permutation, one.p_wilcoxon)]
    needed = NONE if one.needed is None else f"{one.needed:,}"
    return [
        *cells,
        (gap, one.interval.mean),
        *tests,
        (number(one.effect, 2), one.effect),
        (number(one.improvement, 2), one.improvement),
        (needed, one.needed),
    ]


def _half(half: float | None) -> str:
    return "" if half is None else f" <small>± {half:.3f}</small>"


def _cost_table(rows: Sequence[Row]) -> str:
    head = ["method", "seconds", "teacher calls", "peak memory (MB)", "student parameters", "updates to target",
            "reached it", "tuning (s)"]  # fmt: skip
    body: list[list[tuple[str, float | str | None]]] = []
    for place, row in enumerate(rows):
        cost = row.cost
        if cost is None:
            continue
        target = NONE if cost.updates_to_target is None else f"{cost.updates_to_target:,.0f}"
        body.append(
            [
                _method(place, row),
                (f"{cost.seconds:.1f}", cost.seconds),
                (f"{cost.teacher_calls:,.0f}", cost.teacher_calls),
                (words.megabytes(cost.peak_memory), cost.peak_memory),
                (f"{cost.parameters:,}", cost.parameters),
                (target, cost.updates_to_target),
                (f"{cost.reached} of {len(row.scores)}", cost.reached),
                (f"{cost.tuning_seconds:.0f}", cost.tuning_seconds),
            ]
        )
    return f"<h3>What it cost</h3>{table(head, body)}" if body else ""


def _ranks(analysis: Analysis) -> str:
    if analysis.ranks is None:
        return ""
    drawn = figures.ranks(analysis, "ranks")
    return (
        f'<section id="ranks"><h2>Ranks</h2><p>{escape(text.rank_words(analysis))}</p>'
        f'<figure class="wide">{drawn}</figure></section>\n'
    )


def _tuning(analysis: Analysis) -> str:
    plan = analysis.plan
    if not plan.tuned:
        return ""
    head = [
        "method",
        "pair",
        "searched",
        "chosen",
        "validation",
        *(["tuned less as given"] if plan.defaults else []),
    ]
    body: list[list[tuple[str, float | str | None]]] = []
    for pair, rows in analysis.rows.items():
        for place, row in enumerate(rows):
            if row.chosen is None:
                continue
            value = row.trials[row.chosen]
            space = words.search(plan.spaces[row.entry.method])
            cells: list[tuple[str, float | str | None]] = [
                _method(place, row),
                (escape(pair), pair),
                (f"<code>{escape(space)}</code>", space),
                (f"<code>{escape(words.settings(row.settings))}</code>", words.settings(row.settings)),
                (number(value, 4), value),
            ]
            if plan.defaults:
                gain = row.gain
                cells.append((NONE, None) if gain is None else (gain.signed(), gain.mean))
            body.append(cells)
    return (
        f'<section id="tuning"><h2>What was tuned, and how</h2>{table(head, body, kind="words")}</section>\n'
    )


def _told_failures(analysis: Analysis) -> list[tuple[str, str]]:
    found = [
        (f"{row.title} on {pair}", f"not applicable: {row.reason}")
        for pair, rows in analysis.rows.items()
        for row in rows
        if row.entry.facts.refused is not None
    ]
    for one, result in analysis.failures:
        error = result["error"]
        where = f" ({error['type']} at {error['where']})" if error["where"] else ""
        told = "; ".join([error["message"], *error["notes"]])
        found.append((f"{one.method} on {one.pair}, seed {one.seed}", f"{result['status']}: {told}{where}"))
    return found


def _failures(analysis: Analysis) -> str:
    told = _told_failures(analysis)
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
        "versions": {**entry.versions, **(done or {}).get("versions", {})},
        **{key: done[key] for key in ("plugins", "machine", "kernel", "git") if done},
    }
    head = [
        "phase",
        "trial",
        "seed",
        "status",
        "validation",
        "test",
        "test opened",
        "began (UTC)",
        "seconds",
        "differs",
        "cell",
    ]
    body = [_cell(analysis, one, found, done) for one, found in cells]
    return (
        f"<details><summary>{escape(row.title)} <small>on {escape(entry.pair)}, {len(cells)} cells</small></summary>"
        f'<div class="columns"><div><h4>Settings passed</h4><pre>{escape(passed)}</pre></div>'
        f"<div><h4>Settings in force</h4><pre>{escape(in_force)}</pre></div>"
        f"<div><h4>Made from</h4><pre>{escape(to_yaml(origin))}</pre></div></div>{table(head, body)}</details>"
    )


def _cell(
    analysis: Analysis, one: Cell, found: Mapping[str, Any] | None, first: Mapping[str, Any] | None
) -> list[tuple[str, float | str | None]]:
    metric = analysis.plan.entry(one.method, one.pair).facts.metric
    values = [score(found, split, metric) for split in ("validation", "test")]
    status = "not run" if found is None else str(found["status"])
    began = None if found is None else float(found["started"])
    seconds = None if found is None else found.get("seconds")
    shown = NONE if began is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(began))
    opened = NONE if found is None or "test_opened" not in found else str(found["test_opened"])
    return [
        (one.phase, one.phase),
        (str(one.trial), one.trial),
        (str(one.seed), one.seed),
        (escape(status), status),
        *((number(value, 4), value) for value in values),
        (opened, opened),
        (shown, began),
        (NONE if seconds is None else f"{seconds:.1f}", seconds),
        (escape(_apart(found, first)), None),
        (f"<code>{one.digest}</code>", one.digest),
    ]


def _apart(found: Mapping[str, Any] | None, first: Mapping[str, Any] | None) -> str:
    """Where a cell's machine or versions are not those that stand above its table."""
    if not found or not first or found["status"] != "done":
        return ""
    keys = ("versions", "plugins", "machine", "kernel")
    told = differences({key: first[key] for key in keys}, {key: found[key] for key in keys})
    return "; ".join(f"{path}: {json.dumps(its)}" for path, _, its in told)


def _reading(analysis: Analysis) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in words.reading(analysis))
    remarks = "".join(f"<p>{escape(note)}</p>" for note in text.notes(analysis) if note)
    return f'<section id="reading"><h2>How to read this</h2>{lines}{remarks}</section>\n'
