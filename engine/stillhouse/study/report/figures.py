"""The report's figures: SVG by matplotlib, in colours that the page's style sheet sets (light and dark)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stillhouse.study.analysis import Analysis, Row, split_of
from stillhouse.study.extra import library
from stillhouse.study.ranking import Ranking

COLOURS = 20
"""Of the style sheet; further methods use them again."""
INK, FAINT = "#010101", "#020202"
"""Stand for text and for grid lines; replaced by the page's own."""
WIDTH = 6.4
_PAINTS = {INK: "var(--ink)", FAINT: "var(--line)"} | {
    f"#0300{n:02x}": f"var(--m{n})" for n in range(COLOURS)
}


def paint(number: int) -> str:
    """The placeholder of the colour of the method at this place of the study."""
    return f"#0300{number % COLOURS:02x}"


@contextmanager
def _figure(height: float, name: str) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure and its axes; the SVG text is appended to the list at the end."""
    library("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "font.sans-serif": ["DejaVu Sans"],
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.edgecolor": FAINT,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        out: list[str] = []
        yield figure, axes, out
        made = io.StringIO()
        figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None})
        out.append(_themed(made.getvalue(), name))


def _themed(svg: str, name: str) -> str:
    """The bare svg element: the page's colours and font, ids that no other figure has, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
    svg = re.sub(r'\bid="(?!method-)', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r'\bid="method-(\d+)-\d+"', r'class="m\1"', svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, colour in _PAINTS.items():
        svg = svg.replace(stand_in, colour)
    return svg


class _Marks:
    """Gives every mark of a method the class ``mN``, so that the page can dim the others."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, number: int, *artists: Any) -> None:
        for artist in artists:
            self._next += 1
            artist.set_gid(f"method-{number}-{self._next}")


def intervals(rows: Sequence[Row], baseline: str, name: str) -> str:
    """Mean and interval of each method, with a dot for each seed; the line is the baseline's mean."""
    shown = [(number, row) for number, row in enumerate(rows) if row.interval is not None]
    with _figure(0.75 + 0.34 * len(shown), name) as (_, axes, out):
        mark = _Marks()
        for place, (number, row) in enumerate(shown):
            assert row.interval is not None
            colour, mean, half = paint(number), row.interval.mean, row.interval.half
            values = list(row.scores.values())
            mark(
                number,
                axes.scatter(values, [place + 0.27] * len(values), s=13, color=colour, alpha=0.45, lw=0),
            )
            if half is not None:
                mark(
                    number,
                    *axes.plot(
                        [mean - half, mean + half],
                        [place, place],
                        color=colour,
                        lw=2.4,
                        solid_capstyle="round",
                    ),
                )
            mark(number, axes.scatter([mean], [place], s=44, color=colour, zorder=3, lw=0))
            if row.entry.method == baseline:
                axes.axvline(mean, color=INK, lw=0.8, ls=(0, (3, 3)), zorder=0)
        axes.set_yticks(range(len(shown)), [row.title for _, row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(_metric(rows, split_of(rows)))
    return out[0]


def curves(rows: Sequence[Row], name: str) -> str:
    """Validation score over the updates: the mean of the seeds, and its interval as a band."""
    with _figure(_height(rows), name) as (_, axes, out):
        mark = _Marks()
        for number, row in enumerate(rows):
            if not row.curve:
                continue
            steps = [step for step, _ in row.curve]
            means = [interval.mean for _, interval in row.curve]
            halves = [interval.half or 0.0 for _, interval in row.curve]
            low = [mean - half for mean, half in zip(means, halves, strict=True)]
            high = [mean + half for mean, half in zip(means, halves, strict=True)]
            style = "-" if number < COLOURS else "--"
            mark(number, axes.fill_between(steps, low, high, color=paint(number), alpha=0.14, lw=0))
            mark(
                number,
                *axes.plot(
                    steps,
                    means,
                    style,
                    color=paint(number),
                    lw=1.8,
                    marker="o",
                    ms=3 if len(steps) < 12 else 0,
                ),
            )
        axes.set(xlabel="student updates", ylabel=_metric(rows, "validation"))
    return out[0]


def costs(rows: Sequence[Row], name: str) -> str:
    """Score against seconds of training."""
    with _figure(_height(rows), name) as (figure, axes, out):
        mark = _Marks()
        labels = []
        for number, row in enumerate(rows):
            if row.cost is None or row.interval is None:
                continue
            x, y, half = row.cost.seconds, row.interval.mean, row.interval.half or 0.0
            mark(number, *axes.plot([x, x], [y - half, y + half], color=paint(number), lw=1.6, alpha=0.35))
            mark(number, axes.scatter([x], [y], s=52, color=paint(number), zorder=3, lw=0))
            label = axes.annotate(
                row.title, (x, y), (7, -3), textcoords="offset points", fontsize=8, color=INK
            )
            mark(number, label)
            labels.append(label)
        axes.margins(x=0.2, y=0.1)
        axes.set(xlabel="seconds of training", ylabel=_metric(rows, split_of(rows)))
        _spread(figure, labels)
    return out[0]


def _spread(figure: Any, labels: Sequence[Any]) -> None:
    """Move labels up until none lies on another."""
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    placed: list[Any] = []
    for label in sorted(labels, key=lambda one: one.get_window_extent().y0):
        for _ in range(len(labels)):
            box = label.get_window_extent()
            under = [other for other in placed if box.overlaps(other)]
            if not under:
                break
            right, up = label.get_position()
            label.set_position((right, up + (max(other.y1 for other in under) - box.y0) * scale + 0.5))
        placed.append(label.get_window_extent())


def tuning(rows: Sequence[Row], name: str) -> str:
    """Each setting's validation score; the chosen one is filled, the method as given is a square."""
    shown = [(number, row) for number, row in enumerate(rows) if row.chosen is not None]
    with _figure(0.75 + 0.34 * len(shown), name) as (_, axes, out):
        mark = _Marks()
        for place, (number, row) in enumerate(shown):
            for trial, value in enumerate(row.trials):
                if value is None:
                    continue
                chosen = trial == row.chosen
                face = {"facecolor": paint(number) if chosen else "none", "edgecolor": paint(number)}
                shape = "s" if trial == 0 else "o"
                mark(
                    number,
                    axes.scatter(
                        [value],
                        [place],
                        s=46 if chosen else 26,
                        marker=shape,
                        lw=1.3,
                        zorder=3 if chosen else 2,
                        **face,
                    ),
                )
        axes.set_yticks(range(len(shown)), [row.title for _, row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(_metric(rows, "validation"))
    return out[0]


def ranks(analysis: Analysis, ranking: Ranking, name: str) -> str:
    """The critical-difference diagram (Demšar 2006): a bar joins what Nemenyi's test does not tell apart."""
    found = ranking.ranks
    import pandas as pd

    titles = analysis.plan.titles
    order = list(found.average)
    table = pd.DataFrame(1.0, index=[titles[n] for n in order], columns=[titles[n] for n in order])
    for (one, other), p in found.pairwise.items():
        table.loc[titles[one], titles[other]] = table.loc[titles[other], titles[one]] = p
    averages = {titles[n]: rank for n, rank in found.average.items()}
    palette = {titles[n]: paint(list(titles).index(n)) for n in order}
    with _figure(0.9 + 0.24 * ((len(order) + 1) // 2), name) as (_, axes, out):
        library("scikit_posthocs").critical_difference_diagram(
            averages,
            table,
            ax=axes,
            label_fmt_left="{label}, {rank:.2f}",
            label_fmt_right="{rank:.2f}, {label}",
            color_palette=palette,
            label_props={"fontsize": 8.5},
            crossbar_props={"color": INK, "marker": None, "linewidth": 2.4},
            elbow_props={"linewidth": 1.2},
            text_h_margin=0.12,
        )
        axes.grid(visible=False)
    return out[0]


def _height(rows: Sequence[Row]) -> float:
    """As high as the figures that have a line for each method, so that they stand side by side."""
    return max(3.0, 0.75 + 0.34 * sum(row.interval is not None for row in rows))


def _metric(rows: Sequence[Row], split: str) -> str:
    return f"{split} {next((row.entry.facts.metric for row in rows if row.scores), 'score')}"
