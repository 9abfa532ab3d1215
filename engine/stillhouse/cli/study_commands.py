"""The commands that compare methods: ``study``, ``compare``, ``report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stillhouse.errors import ConfigError
from stillhouse.study import live, report
from stillhouse.study import run as studies
from stillhouse.study.analysis import Analysis, analyse
from stillhouse.study.compare import of_configs
from stillhouse.study.plan import Plan, answered, of_study
from stillhouse.study.report.text import brief
from stillhouse.study.schema import read, to_text
from stillhouse.study.work import FAILED


def study(options: argparse.Namespace) -> int:
    """Tune and run every method of a study, and write its report; 1 where a cell failed."""
    given = read(options.study, quick=options.quick)
    folder = Path(options.out or f"runs/study-{given.name}").expanduser()
    chosen = studies.Options(
        workers=options.workers,
        ray=options.ray,
        resume=options.resume,
        overwrite=options.overwrite,
        limit=options.limit,
        merge=[Path(other).expanduser() for other in options.merge],
    )
    return _make(of_study(given), folder, to_text(given), chosen)


def compare(options: argparse.Namespace) -> int:
    """Run every config with every seed, and write the report; 1 where a run failed."""
    from stillhouse.config import dump, to_yaml
    from stillhouse.config import read as read_run

    names = [word for word in options.configs if "=" not in word]
    overrides = [word for word in options.configs if "=" in word]
    if not names:
        raise ConfigError("compare: got only overrides; expected at least one config")
    configs = [read_run(name, overrides) for name in names]
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {options.seeds}: expected whole numbers, as in 0,1,2") from None
    text = to_yaml({"seeds": seeds, "compared": [dump(config) for config in configs]})
    chosen = studies.Options(workers=options.workers, resume=options.resume, overwrite=options.overwrite)
    return _make(of_configs(configs, seeds), Path(options.out).expanduser(), text, chosen)


def _make(plan: Plan, folder: Path, text: str, chosen: studies.Options) -> int:
    if chosen.workers is not None and chosen.workers < 1:
        raise ConfigError(f"--workers {chosen.workers}: expected 1 or more")
    if chosen.limit is not None and not chosen.limit > 0:
        raise ConfigError(f"--limit {chosen.limit:g}: expected more than 0 seconds")
    made = studies.make(plan, folder, text, chosen, live.view())
    analysis = analyse(made.plan, made.results)
    report.write(analysis, folder)
    _show(analysis)
    if made.cell_seconds:
        own = live.duration(made.cell_seconds)
        print(f"{own} of cells in {live.duration(made.seconds)}, {made.workers} at once")
    print(f"see {folder / 'report.html'}")
    return 1 if _failed(analysis) else 0


def _failed(analysis: Analysis) -> bool:
    """Whether something is missing; a trial that diverged, among others that did not, is an answer."""
    lost = any(one.phase != "tuning" or not answered(found) for one, found in analysis.failures)
    prepared = all(entry.facts.status != FAILED for entry in analysis.plan.entries)
    return (
        lost or not prepared or any(row.status == FAILED for rows in analysis.rows.values() for row in rows)
    )


def _show(analysis: Analysis) -> None:
    if sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(brief(analysis)))
    else:
        print(f"\n{brief(analysis)}")


def write_report(options: argparse.Namespace) -> int:
    """Write the report of a study's directory again, finished or not."""
    folder = Path(options.dir).expanduser()
    analysis = analyse(*studies.load(folder))
    out = Path(options.out or folder).expanduser()
    report.write(analysis, out)
    print(f"see {out / 'report.html'}")
    return 0
