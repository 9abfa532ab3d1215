"""A small study, and changes of it."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from stillhouse.study import live, report
from stillhouse.study import run as studies
from stillhouse.study.analysis import Analysis, analyse
from stillhouse.study.plan import of_study
from stillhouse.study.schema import to_text, validate

RATES = {"low": 0.001, "high": 0.1, "log": True}
SMALL: dict[str, Any] = {
    "name": "small",
    "question": "Does a teacher help?",
    "baseline": "hard",
    "budget": {"updates": 30, "trials": 2},
    "seeds": {"tuning": [100], "fresh": [0, 1, 2]},
    "common": {"threads": 1, "batch_size": 16, "validate_every": 10, "log_every": 10, "checkpoint_every": 10},
    "pairs": [
        {
            "name": "digits",
            "task": {"name": "digits", "labelled": 60, "unlabelled": 80, "validation": 60},
            "teacher": {"name": "mlp", "hidden": 16, "train": {"steps": 20}},
            "student": {"name": "mlp", "hidden": 8},
        },
        {
            "name": "diabetes",
            "task": "diabetes",
            "teacher": {"name": "mlp", "train": {"steps": 5}},
            "student": "mlp",
        },
    ],
    "methods": {
        "hard": {
            "title": "Hard labels",
            "config": {"method": "hard_labels"},
            "search": {"optimizer.lr": RATES},
        },
        "kd": {"title": "KD", "config": {"method": "kd"}, "search": {"optimizer.lr": RATES}},
    },
}


def small(**changes: Any) -> dict[str, Any]:
    """The small study with changes by path, such as ``budget__trials=0``."""
    content = copy.deepcopy(SMALL)
    for path, value in changes.items():
        *parents, last = path.split("__")
        here = content
        for parent in parents:
            here = here[parent]
        here[last] = value
    return content


def untuned(**changes: Any) -> dict[str, Any]:
    """One pair, no tuning: the fewest cells."""
    content = small(**{"budget": {"updates": 12}, "seeds": {"fresh": [0, 1, 2]}, **changes})
    content["pairs"] = content["pairs"][:1]
    for method in content["methods"].values():
        method.pop("search", None)
    return content


def make(content: dict[str, Any], folder: Path, **options: Any) -> tuple[Analysis, str]:
    """Run a study; what it came to, and what it said."""
    study = validate(content)
    said = io.StringIO()
    with redirect_stdout(said):
        made = studies.make(
            of_study(study), folder, to_text(study), studies.Options(workers=2, **options), live.Live()
        )
    analysis = analyse(made.plan, made.results)
    report.write(analysis, folder)
    return analysis, said.getvalue()
