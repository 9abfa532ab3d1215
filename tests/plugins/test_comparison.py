"""The studies of docs/methods/comparison.md: six settings for each method, alike in what a comparison holds fixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.study.plan import of_study
from stillhouse.study.schema import read

STUDIES = sorted((Path(__file__).parents[2] / "examples" / "comparison").glob("*.yaml"))


def test_every_setting_of_the_page_has_a_study():
    assert [path.stem for path in STUDIES] == ["mnist1d", "multitask", "noisy", "withdrawn"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_rows_of_a_pair_share_data_student_schedule_and_teacher_and_each_tries_its_whole_grid(path):
    plan = of_study(read(str(path)))
    for pair in plan.pairs:
        entries = [entry for entry in plan.entries if entry.pair == pair]
        assert {len(entry.trials) for entry in entries} == {6}
        configs = [trial.config for entry in entries for trial in entry.trials]
        for name in ("task", "student", "steps", "batch_size", "scheduler", "precision"):
            assert all(config[name] == configs[0][name] for config in configs), name
        teachers = [config["teacher"] for config in configs if "teacher" in config]
        assert all(teacher == teachers[0] for teacher in teachers)
        for entry in entries:
            grid = 1
            for choices in plan.spaces[entry.method].values():
                grid *= len(choices)
            assert grid == 6, "the given settings are one of the six"
