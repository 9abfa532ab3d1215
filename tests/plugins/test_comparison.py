"""The configs of docs/methods/comparison.md: valid, alike in what a comparison holds fixed, tuned by one budget."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path

import pytest

from stillhouse.config import apply_override, dump, read, validate
from stillhouse.runs.resolve import resolve

FOLDER = Path(__file__).parents[2] / "examples" / "comparison"
TUNING = runpy.run_path(str(FOLDER / "tune.py"))
GRIDS = TUNING["GRIDS"]
CELLS = [(setting, name) for setting in GRIDS for name in GRIDS[setting]]


@pytest.mark.parametrize("setting", GRIDS)
def test_all_rows_share_data_student_updates_schedule_and_teacher(setting):
    configs = sorted((FOLDER / setting).glob("*.yaml"))
    assert {path.stem for path in configs} >= set(GRIDS[setting])
    shown = [dump(resolve(read(str(path))).config) for path in configs]
    for name in ("task", "student", "steps", "batch_size", "scheduler", "precision"):
        assert all(config[name] == shown[0][name] for config in shown), name
    teachers = [config["teacher"] for config in shown if "teacher" in config]
    assert all(teacher == teachers[0] for teacher in teachers)


@pytest.mark.parametrize(("setting", "name"), CELLS)
def test_every_method_is_tuned_over_six_cells_one_of_which_was_chosen(setting, name):
    grid = GRIDS[setting][name]
    chosen = read(str(FOLDER / setting / f"{name}.yaml"))
    cells = []
    for values in itertools.product(*grid.values()):
        content = json.loads(chosen.model_dump_json(exclude_none=True, exclude={"methods"}))
        for key, value in zip(grid, values, strict=True):
            apply_override(content, f"{key}={json.dumps(value)}")
        cells.append(dump(resolve(validate(content)).config))
    assert len(cells) == len({json.dumps(cell) for cell in cells}) == 6
    assert dump(resolve(chosen).config) in cells


def test_the_table_has_paired_differences_and_costs(tmp_path, capsys):
    runs = {
        "hard": [(0.5, {"student": 10}), (0.6, {"student": 10})],
        "tcmd": [(0.7, {"student": 10, "tcmd.specialist0": 5, "tcmd.network": 10})] * 2,
    }
    content = {
        name: [
            {"metric": "accuracy", "scores": {"test": {"accuracy": score}}, "parameters": sizes, "seconds": 3, "teacher_calls": 4}
            for score, sizes in made
        ]
        for name, made in runs.items()
    }  # fmt: skip
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": content}))
    runpy.run_path(str(FOLDER / "table.py"))["main"](str(tmp_path), "hard")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| hard | 0.550 ± 0.635 | - | 3 | 4 | 10 |"
    assert lines[3] == "| tcmd | 0.700 ± 0.000 | +0.150 ± 0.635 | 3 | 4 | 15 |"
