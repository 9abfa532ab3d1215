"""The report's tables: for each one list of columns, which Markdown, LaTeX, CSV and the page all render."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.study.analysis import NOT_RUN, Analysis, Row, split_of
from stillhouse.study.plan import Cell, score
from stillhouse.study.ranking import Ranking
from stillhouse.study.report import words
from stillhouse.study.report.words import NONE, number
from stillhouse.study.statistics import FEWEST, Interval


def _none(item: Any) -> str:
    return NONE


@dataclass(frozen=True)
class Column:
    """A column of a table whose lines are items, such as the rows of a pair.

    head
        What stands above it; None: of the CSV alone.
    value
        Of an item: what CSV writes and the page sorts by, or None. An interval or a pair of numbers fills two of ``keys``.
    show
        The value in words.
    keys
        Its names in CSV; none: not in it.
    missing
        What is shown of an item without a value.
    dress
        How the page sets it off: ``method``, ``mean``, ``difference``, ``code`` or nothing.
    """

    head: str | None
    value: Callable[[Any], Any]
    show: Callable[[Any], str] = str
    keys: tuple[str, ...] = ()
    missing: Callable[[Any], str] = _none
    dress: str = ""

    def text(self, item: Any) -> str:
        """What a reader sees."""
        value = self.value(item)
        return self.missing(item) if value is None else self.show(value)

    def order(self, item: Any) -> float | str | None:
        """What the page sorts by; None goes last."""
        value: Any = self.value(item)
        if isinstance(value, Interval):
            return value.mean
        first: float | str | None = value[0] if isinstance(value, tuple) else value
        return first

    def raw(self, item: Any) -> list[Any]:
        """A value for each of ``keys``, unrounded."""
        value = self.value(item)
        if value is None:
            return [None] * len(self.keys)
        if isinstance(value, Interval):
            return [value.mean, value.half]
        return list(value) if isinstance(value, tuple) else [value]


@dataclass(frozen=True)
class Table:
    """Columns and the items that they are of."""

    columns: Sequence[Column]
    items: Sequence[Any]

    @property
    def shown(self) -> list[Column]:
        """The columns that a reader sees."""
        return [column for column in self.columns if column.head is not None]

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """The heads, and the words of every line."""
        heads = [str(column.head) for column in self.shown]
        return heads, [[column.text(item) for column in self.shown] for item in self.items]

    def raw(self) -> tuple[list[str], list[list[Any]]]:
        """The names and the values of CSV."""
        kept = [column for column in self.columns if column.keys]
        names = [key for column in kept for key in column.keys]
        return names, [[value for column in kept for value in column.raw(item)] for item in self.items]


def joined(tables: Iterable[Table]) -> Table:
    """The lines of tables of the same columns below each other."""
    tables = list(tables)
    return Table(tables[0].columns, [item for table in tables for item in table.items])


def _through(part: str, name: str) -> Callable[[Any], Any]:
    """A field of a part that a row may lack."""
    return lambda row: None if getattr(row, part) is None else getattr(getattr(row, part), name)


def _gap(name: str) -> Callable[[Any], Any]:
    return _through("difference", name)


def _cost(name: str) -> Callable[[Any], Any]:
    return _through("cost", name)


def _two(value: float) -> str:
    return number(value, 2)


def _count(value: float) -> str:
    return f"{value:,.0f}"


PAIR = Column(None, lambda row: row.entry.pair, keys=("pair",))
METHOD = Column(None, lambda row: row.method, keys=("method",))
TITLE = Column("method", lambda row: row.title, dress="method")


def scores(analysis: Analysis, pair: str) -> Table:
    """The methods of a pair with all their statistics."""
    rows = analysis.rows[pair]
    metric = next((row.entry.facts.metric for row in rows if row.scores), "score")
    base = analysis.plan.titles[analysis.plan.baseline]
    columns = [
        PAIR,
        METHOD,
        TITLE,
        Column(None, lambda row: row.entry.facts.metric, keys=("metric",)),
        Column(None, lambda row: row.split if row.scores else None, keys=("split",)),
        Column(None, _through("interval", "n"), keys=("n",)),
        Column(
            f"{split_of(rows)} {metric}", lambda row: row.interval, keys=("mean", "half_width"),
            missing=lambda row: row.status, dress="mean",
        ),
        Column("BCa interval", lambda row: row.bca, _ends, ("bca_low", "bca_high")),
        Column("IQM", lambda row: row.interquartile, "{:.3f}".format, ("interquartile_mean",)),
        Column(
            f"to {base}", _gap("interval"), Interval.signed, ("difference", "difference_half_width"), dress="difference"
        ),
        Column(None, _gap("p"), keys=("p_t",)),
        Column("p (Holm)", _gap("p_holm"), number, ("p_holm",)),
        Column("permutation", _gap("p_permutation"), number, ("p_permutation",)),
        Column("Wilcoxon", _gap("p_wilcoxon"), number, ("p_wilcoxon",)),
        Column("effect", _gap("effect"), _two, ("effect",)),
        Column("P(better)", _gap("improvement"), _two, ("p_better",)),
        Column("seeds needed", _gap("needed"), _count, ("seeds_needed",)),
        Column(None, _gap("verdict"), keys=("verdict",)),
        Column(None, lambda row: words.settings(row.settings), keys=("settings",)),
        Column(None, lambda row: row.reason, keys=("reason",)),
    ]  # fmt: skip
    return Table(columns, rows)


def _ends(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _reached(row: Row) -> str | None:
    return None if row.cost is None else f"{row.cost.reached} of {len(row.scores)}"


COSTS = (
    PAIR,
    METHOD,
    TITLE,
    Column("updates", _cost("updates"), _count, ("updates",)),
    Column("seconds", _cost("seconds"), "{:.1f}".format, ("seconds",)),
    Column("teacher calls", _cost("teacher_calls"), _count, ("teacher_calls",)),
    Column("peak memory (MB)", _cost("peak_memory"), words.megabytes, ("peak_memory_bytes",)),
    Column("GPU memory (MB)", _cost("peak_gpu_memory"), words.megabytes, ("peak_gpu_memory_bytes",)),
    Column("parameters", _cost("parameters"), _count, ("student_parameters",)),
    Column("updates to target", _cost("updates_to_target"), _count, ("updates_to_target",)),
    Column("looked at every", _cost("grid"), _count, ("validate_every",)),
    Column("reached it", _reached),
    Column(None, _cost("reached"), keys=("reached_target",)),
    Column(None, lambda row: len(row.scores), keys=("seeds",)),
    Column("tuning (s)", _cost("tuning_seconds"), "{:.0f}".format, ("tuning_seconds",)),
)


def costs(analysis: Analysis, pair: str) -> Table:
    """What the methods of a pair took."""
    return Table(COSTS, [row for row in analysis.rows[pair] if row.cost is not None])


def brief(analysis: Analysis, pair: str) -> Table:
    """The few columns that a terminal has room for."""
    mean = next(column for column in scores(analysis, pair).columns if column.keys[:1] == ("mean",))
    base = analysis.plan.titles[analysis.plan.baseline]
    what = "mean and 95 % interval" if len(analysis.plan.fresh_seeds) >= FEWEST else "mean"
    columns = [
        Column(pair, lambda row: row.title),
        Column(f"{mean.head}, {what}", mean.value, missing=mean.missing),
        Column(f"paired difference to {base}", _gap("interval"), Interval.signed, missing=lambda row: "-"),
        *(column for column in COSTS if column.head in ("updates", "teacher calls", "seconds")),
    ]
    return Table(columns, analysis.rows[pair])


def chosen(analysis: Analysis) -> Table:
    """What was searched for each method and pair, and what of it was chosen."""
    spaces = analysis.plan.spaces
    columns = [
        TITLE,
        Column("pair", lambda row: row.entry.pair),
        Column("searched", lambda row: words.search(spaces[row.method]), dress="code"),
        Column("chosen", lambda row: words.settings(row.settings), dress="code"),
        Column("validation", lambda row: row.trials[row.chosen], lambda value: number(value, 4)),
    ]
    if analysis.plan.defaults:
        columns.append(Column("tuned less as given", lambda row: row.gain, Interval.signed))
    return Table(columns, [row for rows in analysis.rows.values() for row in rows if row.chosen is not None])


@dataclass(frozen=True)
class Tried:
    """A setting that was tried."""

    row: Row
    trial: int

    @property
    def method(self) -> str:
        """The method's key in the study's file."""
        return self.row.method


TRIED = (
    Column("method", lambda tried: tried.row.title, dress="method"),
    Column("pair", lambda tried: tried.row.entry.pair),
    Column("setting", lambda tried: words.settings(tried.row.entry.trials[tried.trial].settings), dress="code"),
    Column(
        "validation", lambda tried: tried.row.trials[tried.trial], lambda value: number(value, 4),
        missing=lambda tried: tried.row.lost.get(tried.trial, NOT_RUN),
    ),
    Column("trial", lambda tried: tried.trial),
    Column("taken", lambda tried: "chosen" if tried.trial == tried.row.chosen else None, missing=lambda tried: ""),
)  # fmt: skip


def tried(analysis: Analysis) -> Table:
    """Every setting that was tried, with its mean validation score or why it has none."""
    return Table(
        TRIED,
        [
            Tried(row, trial)
            for rows in analysis.rows.values()
            for row in rows
            for trial in range(len(row.trials))
        ],
    )


@dataclass(frozen=True)
class Ranked:
    """A method with its average rank."""

    method: str
    title: str
    rank: float


def ranks(analysis: Analysis, ranking: Ranking) -> Table:
    """The methods by their average rank, the best first."""
    ordered = sorted(ranking.ranks.average.items(), key=lambda item: item[1])
    return Table(
        [TITLE, Column("average rank", lambda one: one.rank, "{:.2f}".format)],
        [Ranked(name, analysis.plan.titles[name], rank) for name, rank in ordered],
    )


@dataclass(frozen=True)
class Ran:
    """A cell with its result, if it has one; ``apart``: where its origin is not that of the cells beside it."""

    cell: Cell
    found: Mapping[str, Any] | None
    metric: str
    apart: str = ""

    def score(self, split: str) -> float | None:
        """Its score of the split."""
        return score(self.found, split, self.metric)


def _of_result(name: str) -> Callable[[Any], Any]:
    return lambda ran: None if ran.found is None else ran.found.get(name)


def _moment(began: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(began))


def _four(value: float) -> str:
    return number(value, 4)


RUNS = (
    Column(None, lambda ran: ran.cell.pair, keys=("pair",)),
    Column(None, lambda ran: ran.cell.method, keys=("method",)),
    Column("phase", lambda ran: ran.cell.phase, keys=("phase",)),
    Column("trial", lambda ran: ran.cell.trial, keys=("trial",)),
    Column("seed", lambda ran: ran.cell.seed, keys=("seed",)),
    Column("status", lambda ran: NOT_RUN if ran.found is None else ran.found["status"], keys=("status",)),
    Column(None, lambda ran: ran.metric, keys=("metric",)),
    Column("validation", lambda ran: ran.score("validation"), _four, ("validation",)),
    Column("test", lambda ran: ran.score("test"), _four, ("test",)),
    Column("test opened", _of_result("test_opened")),
    Column("began (UTC)", _of_result("started"), _moment),
    Column("seconds", _of_result("seconds"), "{:.1f}".format),
    Column("differs", lambda ran: ran.apart),
    Column("cell", lambda ran: ran.cell.digest, keys=("cell",), dress="code"),
)
"""No time stands in CSV: it is the same however often the study is made."""


def runs(analysis: Analysis) -> Table:
    """Every cell with its scores."""
    return Table(
        RUNS,
        [
            Ran(one, found, analysis.plan.entry(one.method, one.pair).facts.metric)
            for one, found in analysis.provenance
        ],
    )
