"""Choose settings on the validation split, six configurations for each method: docs/methods/comparison.md.

``python examples/comparison/tune.py OUT [SETTING ...]``, a setting being one of the folders beside this file, writes a
config for each cell of the grids below, runs them (those that are there, finished, are not made again), and prints
their validation scores, the best first. The test split's scores are in the runs' summaries; nothing here reads them.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from stillhouse.config import apply_override, read
from stillhouse.study.compare import compare

HERE = Path(__file__).parent
SEED = 100
"""Not one of the seeds that are reported."""

Grid = dict[str, list[Any]]


def rates(key: str, values: list[Any]) -> Grid:
    """Three learning rates by two values of a method's own setting, the first of them the default."""
    return {"optimizer.lr": [8e-3, 2e-2, 5e-2], key: values}


DECAYS: Grid = {"optimizer.lr": [8e-3, 2e-2], "optimizer.weight_decay": [0.01, 0.3, 1.0]}
"""For the settings of one family's own kind, the same for every method there."""

GRIDS: dict[str, dict[str, Grid]] = {
    "mnist1d": {
        "hard": rates("optimizer.weight_decay", [0.01, 0.3]),
        "kd": rates("method.temperature", [4, 8]),
        "sld": rates("method.temperature", [4, 8]),
        "tcmd": rates("method.shares", [[1, 1, 2], [1, 1, 6]]),
        "ibmd": rates("method.beta", [0.001, 0.1]),
        "hldm": rates("method.temperature", [4, 8]),
        "pddm": rates("method.shares", [[2, 1], [1, 1]]),
    },
    "noisy": dict.fromkeys(["hard", "kd", "ibmd"], DECAYS),
    "withdrawn": dict.fromkeys(["hard", "kd", "pddm"], DECAYS),
    "multitask": dict.fromkeys(["hard", "kd", "sld", "tcmd"], DECAYS),
}


def tune(setting: str, name: str, out: Path) -> list[tuple[float, dict[str, Any]]]:
    """Validation accuracy and values of each cell, the best first."""
    grid = GRIDS[setting][name]
    cells = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    configs = []
    out.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(cells):
        content = yaml.safe_load((HERE / setting / f"{name}.yaml").read_text())
        for key, value in cell.items():
            apply_override(content, f"{key}={json.dumps(value)}")
        path = out / f"{name}-{number}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        configs.append(read(str(path)))
    compare(configs, [SEED], out / name, resume=True)
    made = json.loads((out / name / "comparison.json").read_text())["runs"]
    scores = [made[config.name][0]["scores"]["validation"]["accuracy"] for config in configs]
    return sorted(zip(scores, cells, strict=True), key=lambda row: -row[0])


if __name__ == "__main__":
    folder, *settings = sys.argv[1:]
    for setting in settings or GRIDS:
        for name in GRIDS[setting]:
            for score, cell in tune(setting, name, Path(folder) / setting):
                print(
                    setting,
                    name,
                    f"{score:.3f}",
                    *[f"{key}={value}" for key, value in cell.items()],
                    flush=True,
                )
