"""What a study's file may say, and what is refused before anything is run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from small_study import RATES, small, untuned

from stillhouse.errors import ConfigError
from stillhouse.study.plan import of_study
from stillhouse.study.schema import Study, describe, read, shipped, to_text, validate

LISTED = {"optimizer.lr": [0.01, 0.02, 0.03]}


def searched(space):
    return small(methods__kd__search={"optimizer.lr": space})


def named(key):
    content = small()
    content["methods"][key] = content["methods"].pop("kd")
    return content


REFUSED = {
    "unknown key": (small(budgets=3), "budgets: unknown; did you mean 'budget'?"),
    "unknown key of a cell": (small(common__stpes=3), "common.stpes: unknown; did you mean 'steps'?"),
    "no question": (small(question=""), "question: "),
    "baseline that is none": (small(baseline="kdd"), "baseline 'kdd' is no method of the study; did you mean 'kd'?"),
    "a seed twice": (small(seeds__fresh=[0, 0]), "expected each once"),
    "a tuning seed reported": (small(seeds__fresh=[100, 1]), "none of the tuning seeds among the fresh"),
    "two pairs of a name": (small(pairs=[small()["pairs"][0]] * 2), "expected each name once"),
    "budgets that differ": (small(methods__kd__config__steps=60), "the budgets would differ"),
    "batches that differ": (small(methods__kd__search={"batch_size": [16, 32]}), "the budgets would differ"),
    "search spaces that differ": (
        small(methods__kd__search=LISTED), "the budgets differ: search spaces of hard: 1 range, kd: 3 points; expected the same size"
    ),
    "a search without trials": (small(budget__trials=0), "budget.trials is 0, and there is a search"),
    "trials without a search": (
        small(methods={"hard": {"config": {"method": "hard_labels"}}}), "two or more and a search space"
    ),
    "trials without a seed": (small(seeds__tuning=[]), "expected at least one tuning seed"),
    "a range upside down": (small(methods__kd__search={"optimizer.lr": {"low": 1, "high": 0.1}}), "expected low < high"),
    "a list of one": (small(methods__kd__search={"optimizer.lr": [0.1]}), "has 1 choice"),
    "a pair's key in a method": (small(methods__kd__config__student="mlp"), "it belongs to a pair"),
    "the study's own key": (small(common__seed=3), "the study sets it for each cell"),
    "a teacher of a method's own": (small(methods__kd__config__teachers={"a": {"name": "mlp"}}), "it belongs to a pair"),
    "kept labels of a method's own": (small(methods__kd__search={"soft_labels": ["a", "b"]}), "it belongs to a pair"),
    "defaults that nothing is tuned from": (untuned(defaults=True), "defaults is true and budget.trials is 0"),
    "a seed below 0": (small(seeds__fresh=[-1, 1]), "seeds.fresh.0: input should be greater than or equal to 0, got -1"),
    "a seed that no generator takes": (small(seeds__tuning=[2**32]), "seeds.tuning.0: input should be less than 4294967296"),
    "a seed that is no number": (small(seeds__fresh=["0", 1]), "seeds.fresh.0: input should be a valid integer, got '0'"),
    "a seed that is a word": (small(seeds__fresh=[True, 2]), "seeds.fresh.0: input should be a valid integer, got True"),
    "a seed with a point": (small(seeds__fresh=[1.0, 2]), "seeds.fresh.0: input should be a valid integer, got 1.0"),
    "a range from 0 in the logarithm": (
        searched({"low": 0, "high": 0.1, "log": True}),
        "methods.kd.search: optimizer.lr: low 0, high 0.1: expected low < high, and above 0 where log is true",
    ),
    "a range that is endless": (
        searched({"low": 0.1, "high": math.inf}), "methods.kd.search: optimizer.lr.high: input should be a finite number, got inf"
    ),
    "a range that is no number": (
        searched({"low": math.nan, "high": 1}), "methods.kd.search: optimizer.lr.low: input should be a finite number, got nan"
    ),
    "a range with another key": (
        searched({"lo": 0, "high": 1}), "methods.kd.search: optimizer.lr.low: missing\noptimizer.lr.lo: unknown; did you mean 'low'?"
    ),
    "a search that is neither": (searched(0.1), "optimizer.lr: got 0.1; expected a list of choices, or {low, high, log}"),
    "a choice twice": (searched([0.1, 0.2, 0.1]), "optimizer.lr: got [0.1, 0.2, 0.1]; expected each choice once"),
    "a choice that is no number": (searched([0.1, math.nan]), "optimizer.lr: got [0.1, nan]; expected finite numbers"),
    "a method without a name": (named(""), "methods: got the key ''; expected up to 100 letters"),
    "a method of two lines": (named("a\nb"), "methods: got the key 'a\\nb'; expected"),
    "a method that ends a line": (named("a\n"), "methods: got the key 'a\\n'; expected"),
    "a method with a byte of 0": (named("n\0ul"), "methods: got the key 'n\\x00ul'; expected"),
    "a method that is a path": (named("../kd"), "methods: got the key '../kd'; expected"),
    "a long method": (named("k" * 101), "expected up to 100 letters, digits and . _ + -"),
    "a long name": (small(name="s" * 300), "name: string should match pattern"),
    "two methods of one title": (small(methods__kd__title="Hard labels"), "methods: hard and kd have one title, 'Hard labels'"),
    "a title that is another's key": (small(methods__kd__title="hard", methods__hard__title=None), "have one title, 'hard'"),
    "an empty title": (small(methods__kd__title=""), "methods.kd.title: expected a line of text"),
    "a title of two lines": (small(methods__kd__title="two\nlines"), "methods.kd.title: expected a line of text"),
    "a blank question": (small(question=" \n"), "question: expected a sentence"),
    "an unclear metric": (small(metric={"name": "nll"}), "metric.better: missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_its_path(case):
    content, told = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        validate(content)
    assert told in str(error.value)


def test_a_question_may_be_folded_over_lines():
    assert validate(small(question="Does it\n  help?\n")).question == "Does it help?"


def test_a_study_that_was_written_reads_as_itself():
    study = validate(small(methods__kd__search={"optimizer.lr": RATES}))
    assert validate(yaml.safe_load(to_text(study))) == study


def test_seeds_of_a_comparison_are_checked_before_anything_is_run(cli):
    said = cli("compare", "mnist1d-kd", "--seeds=-1,2")
    assert (said.code, said.out) == (2, "")
    assert "seeds [-1, 2]: expected numbers from 0 to 4294967295" in said.err


def test_a_setting_of_a_trial_is_checked_before_anything_is_run():
    content = small(methods__kd__search={"method.temprature": RATES})
    with pytest.raises(
        ConfigError, match=r"method kd on digits with method\.temprature=.*did you mean 'temperature'"
    ):
        of_study(validate(content))


def test_more_trials_than_points_are_refused():
    content = small(budget__trials=5)
    for method in content["methods"].values():
        method["search"] = LISTED
    with pytest.raises(
        ConfigError, match=r"4 different settings with the given ones, and budget\.trials is 5"
    ):
        of_study(validate(content))


def test_a_given_setting_is_not_tried_twice():
    content = small(budget__trials=3, common__optimizer={"lr": 0.02})
    for method in content["methods"].values():
        method["search"] = LISTED
    tried = [trial.settings for trial in of_study(validate(content)).entry("hard", "digits").trials]
    assert tried[0] == {}
    assert {one["optimizer.lr"] for one in tried[1:]} == {0.01, 0.03}


def test_methods_with_one_range_try_the_same_values_and_settings_pass_what_is_in_force():
    plan = of_study(validate(small(budget__trials=4)))
    hard, kd = plan.entry("hard", "digits"), plan.entry("kd", "digits")
    assert [trial.settings for trial in hard.trials] == [trial.settings for trial in kd.trials]
    for trial in hard.trials[1:]:
        assert trial.config["optimizer"]["lr"] == trial.settings["optimizer.lr"]
        assert 0.001 <= trial.settings["optimizer.lr"] <= 0.1
    assert "optimizer" not in hard.given


def test_a_pair_may_have_several_teachers_or_kept_labels():
    content = untuned()
    pair = content["pairs"][0]
    pair["teachers"] = {name: pair["teacher"] for name in "ab"}
    del pair["teacher"]
    config = of_study(validate(content)).entry("kd", "digits").trials[0].config
    assert set(config["teachers"]) == {"a", "b"}


def test_the_size_of_a_space_in_words():
    assert [describe(size) for size in [(0, 1), (0, 6), (1, 1), (2, 3)]] == [
        "1 points", "6 points", "1 range", "2 ranges by 3 points"
    ]  # fmt: skip


def test_quick_changes_what_it_says_and_the_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(to_text(validate(small(quick={"seeds": {"fresh": [7]}, "budget": {"updates": 3}}))))
    assert read(str(path)).seeds.fresh == [0, 1, 2]
    quick = read(str(path), quick=True)
    assert (quick.name, quick.budget.updates, quick.budget.trials) == ("small-quick", 3, 2)
    assert quick.seeds.model_dump() == {"tuning": [100], "fresh": [7]}
    path.write_text(to_text(validate(small())))
    with pytest.raises(ConfigError, match="has no key 'quick'"):
        read(str(path), quick=True)


def test_a_name_that_nothing_has_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mnist1d'"):
        read("mnist1")


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_study_has_a_quick_form_and_every_setting_of_it_resolves(name):
    study = read(name)
    assert isinstance(study, Study)
    plan = of_study(read(name, quick=True))
    assert {len(entry.trials) for entry in plan.entries} == {
        plan.tuned and read(name, quick=True).budget.trials
    }


def test_the_study_that_the_docs_show_resolves(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "studies.md").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    plan = of_study(read(str(path)))
    assert [len(entry.trials) for entry in plan.entries] == [6, 6]
