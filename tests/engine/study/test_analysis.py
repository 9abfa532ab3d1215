"""What a study concludes, on invented results whose answers are worked out by hand."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
from invented import by_method, done, failed, planned, results

from stillhouse.study.analysis import analyse
from stillhouse.study.report import page, text, words

BASE = [0.50, 0.52, 0.54, 0.56, 0.58]
LOWER = {"metric": "nll", "metrics": ["nll"], "higher": False}


def concluded(plan, result):
    return analyse(plan, results(plan, result))


def shifted(by: float) -> list[float]:
    """The baseline's scores moved by this much, and by a little that differs from seed to seed."""
    return [
        score + by + wobble for score, wobble in zip(BASE, (-0.002, 0.001, 0, -0.001, 0.002), strict=True)
    ]


class TestVerdicts:
    def test_a_method_that_is_steadily_above_is_better_and_one_below_is_worse(self):
        plan = planned(["base", "up", "down"])
        made = concluded(plan, by_method({"base": BASE, "up": shifted(0.1), "down": shifted(-0.1)}))
        _, up, down = made.rows["digits"]
        assert (up.difference.verdict, down.difference.verdict) == ("better", "worse")
        assert (up.difference.improvement, down.difference.improvement) == (1.0, 0.0)
        # s of the wobble is sqrt(1e-5 / 4), so t = .1 / (s / sqrt(5)) = 141.4 and p = 1.5e-8; Holm doubles the smaller
        assert up.difference.p == pytest.approx(1.499e-8, rel=1e-3)
        assert up.difference.p_holm == pytest.approx(2 * up.difference.p)

    def test_where_lower_is_better_the_lower_one_is(self):
        plan = planned(["base", "up", "down"], facts=LOWER)
        scores = {"base": BASE, "up": shifted(0.1), "down": shifted(-0.1)}
        made = concluded(plan, by_method(scores, metric="nll"))
        _, up, down = made.rows["digits"]
        assert (up.difference.verdict, down.difference.verdict) == ("worse", "better")
        assert (up.difference.improvement, down.difference.improvement) == (0.0, 1.0)
        assert down.difference.interval.mean == pytest.approx(-0.1), "the sign stays that of the scores"
        assert made.rankings[0].ranks.average == {"base": 2.0, "up": 3.0, "down": 1.0}

    def test_where_lower_is_better_the_trial_with_the_lowest_score_is_chosen(self):
        plan = planned(2, trials=3, facts=LOWER)
        tried = [0.6, 0.4, 0.5]
        made = concluded(plan, lambda one: done(one, tried[one.trial] if not one.test else 0.5, "nll"))
        assert [row.chosen for row in made.rows["digits"]] == [1, 1]

    def test_equal_differences_are_judged_by_the_permutations_alone(self):
        """Three differences of 1/60: all signs equal in 2 of 8, so p = .25; t would be infinite."""
        plan = planned(2, seeds=3)
        base = [42 / 60, 45 / 60, 49 / 60]
        made = concluded(plan, by_method({"m0": base, "m1": [score + 1 / 60 for score in base]}))
        one = made.rows["digits"][1].difference
        assert (one.p, one.p_permutation, one.p_wilcoxon) == (0.25, 0.25, 0.25)
        assert (one.effect, one.needed, one.verdict) == (None, None, "open")
        assert one.interval.signed() == "+0.017", "an interval of no width would say that it is certain"
        assert "the same for every seed" in made.rows["digits"][1].remarks[0]

    def test_nothing_is_claimed_before_every_cell_has_run(self):
        plan = planned(["base", "up", "late"])
        scores = {"base": BASE, "up": shifted(0.1), "late": BASE}
        most = lambda one: (
            None if one.method == "late" and one.seed == 4 else done(one, scores[one.method][one.seed])
        )
        partial = concluded(plan, most)
        assert {row.difference.verdict for row in partial.rows["digits"][1:]} == {None}
        assert {row.difference.p_holm for row in partial.rows["digits"][1:]} == {None}
        assert partial.rankings == []
        said = words.sentence(plan, partial.rows["digits"][1])
        assert said.endswith("to Base); nothing is claimed before every cell has run.")
        assert "nothing is claimed" in page.page(partial)
        whole = concluded(plan, by_method(scores))
        assert whole.rows["digits"][1].difference.verdict == "better"

    def test_nothing_is_claimed_while_a_cell_is_to_run_again(self):
        plan = planned(["base", "up", "late"])
        scores = {"base": BASE, "up": shifted(0.1), "late": BASE}

        def result(one, again):
            lost = one.method == "late" and one.seed == 4
            return failed(one, again=again) if lost else done(one, scores[one.method][one.seed])

        made = [concluded(plan, lambda one, again=again: result(one, again)) for again in (True, False)]
        assert [one.complete for one in made] == [False, True]
        assert [one.rows["digits"][1].difference.verdict for one in made] == [None, "better"]


class TestScoresThatAreNone:
    @pytest.mark.parametrize("odd", [math.nan, math.inf])
    def test_one_that_is_not_finite_is_missing_with_the_reason(self, odd):
        plan = planned(2, facts={"metric": "perplexity", "metrics": ["perplexity"], "higher": False})
        scores = {"m0": BASE, "m1": [*BASE[:4], odd]}
        made = concluded(plan, by_method(scores, metric="perplexity"))
        row = made.rows["digits"][1]
        assert sorted(row.scores) == [0, 1, 2, 3]
        assert row.remarks == [f"test perplexity is {odd} for seed 4, which counts as no score"]
        assert row.difference.interval.n == 4
        assert row.curve[-1][1].mean == pytest.approx(fmean(BASE[:4]))
        assert page.page(made)

    def test_a_method_with_no_finite_score_says_so(self):
        plan = planned(2)
        made = concluded(plan, by_method({"m0": BASE, "m1": [math.nan] * 5}))
        row = made.rows["digits"][1]
        assert words.sentence(plan, row) == "M1, no score: test accuracy is nan for seeds 0, 1, 2, 3, 4."
        assert page.page(made)
        assert text.markdown(made)

    def test_a_teacher_with_none_is_kept_in_the_plan_without_it(self):
        scores = {"accuracy": math.nan, "nll": None, "r2": 0.5}
        plan = planned(2, facts={"teacher": "abc", "teacher_scores": scores})
        assert plan.entries[0].facts.teacher_scores == {"r2": 0.5}
        made = concluded(plan, by_method({"m0": BASE, "m1": shifted(0.1)}))
        assert page.page(made)

    def test_a_baseline_with_one_is_compared_on_its_other_seeds_and_sets_the_target_by_them(self):
        plan = planned(2)
        made = concluded(plan, by_method({"m0": [*BASE[:4], math.nan], "m1": shifted(0.1)}))
        row = made.rows["digits"][1]
        assert (row.interval.n, row.difference.interval.n) == (5, 4)
        assert (row.cost.reached, row.cost.updates_to_target) == (5, 60)

    def test_a_row_of_the_curve_that_is_not_a_number_reaches_no_target(self):
        plan = planned(2)
        curve = [{"step": 20, "accuracy": math.nan}, {"step": 60, "accuracy": 0.9}]
        made = concluded(plan, lambda one: done(one, 0.6 if one.method == "m0" else 0.9, curve=curve))
        assert made.rows["digits"][1].cost.updates_to_target == 60

    def test_a_trial_that_failed_is_told_and_its_time_is_counted(self):
        plan = planned(2, trials=3)

        def result(one):
            if one.phase == "tuning" and one.method == "m1" and one.trial == 1:
                return failed(one)
            return done(one, 0.5 + 0.01 * one.trial)

        made = concluded(plan, result)
        base, row = made.rows["digits"]
        assert (base.cost.tuning_seconds, row.cost.tuning_seconds) == (2 + 2 + 2, 2 + 7 + 2)
        assert row.chosen == 2
        assert row.trials == [0.5, None, 0.52]
        assert row.remarks == ["trial 1 could not be chosen: failed: loss is not finite"]
        assert "| M1 | digits | optimizer.lr = " in text.markdown(made)
        assert "| failed: loss is not finite | 1 |  |" in text.markdown(made)
        assert "M1 on digits" not in "".join(who for who, _ in words.failures(made))
        assert ("m1 on digits, trial 1, seed 100", "failed: loss is not finite") in words.failures(made)

    def test_a_trial_without_a_finite_score_is_told(self):
        plan = planned(2, trials=2)
        made = concluded(
            plan, lambda one: done(one, math.nan if (one.test, one.trial) == (False, 1) else 0.5)
        )
        assert made.rows["digits"][0].trials == [0.5, None]
        assert made.rows["digits"][0].remarks == [
            "trial 1 could not be chosen: validation accuracy is not finite"
        ]


class TestSplits:
    def test_scores_of_validation_are_called_so_everywhere(self):
        plan = planned(2, trials=2, defaults=True)

        def result(one):
            value = (
                BASE[one.seed] + 0.1 * (one.phase == "final") if one.seed != 100 else 0.5 + 0.1 * one.trial
            )
            return done(one, value, scores={"validation": {"accuracy": value}})

        made = concluded(plan, result)
        row = made.rows["digits"][1]
        assert (row.split, row.interval.n) == ("validation", 5)
        assert row.gain.mean == pytest.approx(0.1), "the method as given is scored on validation too"
        assert "M1 scores 0.640 ± 0.039 on validation" in words.sentence(plan, row)
        assert made.remarks == [
            "digits: no test split, so scores are of validation, which also chose the settings"
        ]
        shown = page.page(made) + text.markdown(made) + text.latex(made) + text.brief(made)
        assert "test accuracy" not in shown
        assert "test score" not in shown
        assert "Scores are of the test split" not in shown
        assert shown.count("validation accuracy") >= 6

    def test_scores_of_test_are_called_so(self):
        plan = planned(2)
        made = concluded(plan, by_method({"m0": BASE, "m1": shifted(0.1)}))
        assert made.rows["digits"][1].split == "test"
        assert made.remarks == []
        assert "test accuracy" in page.page(made)
        assert "Scores are of the test split" in page.page(made)

    def test_what_tuning_gains_is_paired_by_seed(self):
        plan = planned(2, trials=2, defaults=True)

        def result(one):
            return done(
                one,
                {"final": 0.7, "default": 0.6 + 0.01 * one.seed, "tuning": 0.5 + 0.1 * one.trial}[one.phase],
            )

        row = concluded(plan, result).rows["digits"][0]
        assert row.given == pytest.approx({0: 0.6, 1: 0.61, 2: 0.62, 3: 0.63, 4: 0.64})
        assert row.gain.mean == pytest.approx(0.08)
        # t(.975, 4) = 2.776, s = sqrt(2.5e-4)
        assert row.gain.half == pytest.approx(2.7764 * math.sqrt(2.5e-4 / 5), rel=1e-4)


class TestCosts:
    def test_runs_that_make_other_updates_than_the_budgets_are_named(self):
        plan = planned(["base", "pddm"])
        made = concluded(plan, lambda one: done(one, 0.5, steps=260 if one.method == "pddm" else 60))
        assert made.remarks == ["not every run made 60 updates: Pddm on digits 260"]
        assert "not every run made 60 updates" in page.page(made)
        table = text.markdown(made)
        assert "| Base | 60 | 2.0 |" in table
        assert "| Pddm | 260 | 2.0 |" in table

    @pytest.mark.parametrize(
        ("reach", "median", "reached"),
        [
            ([20, 20, 40, 60, None], 40, 4),
            ([20, 40, 60, None, None], 60, 3),
            ([20, 20, None, None, None], None, 2),
            ([None] * 5, None, 0),
        ],
    )
    def test_updates_to_target_are_a_median_in_which_those_that_never_reach_it_are_last(
        self, reach, median, reached
    ):
        plan = planned(2)

        def result(one):
            if one.method == "m0":
                return done(one, 0.5)
            at = reach[one.seed]
            curve = [
                {"step": step, "accuracy": 0.6 if at is not None and step >= at else 0.1}
                for step in (20, 40, 60)
            ]
            return done(one, 0.1 if at is None else 0.6, curve=curve)

        cost = concluded(plan, result).rows["digits"][1].cost
        assert (cost.updates_to_target, cost.reached, cost.grid) == (median, reached, 20)

    def test_memory_of_a_gpu_is_told_where_one_was_used(self):
        plan = planned(2)
        used = lambda one: {"m0": None, "m1": (one.seed + 1) * 10**6}[one.method]
        made = concluded(plan, lambda one: done(one, 0.5, peak_gpu_memory=used(one)))
        assert [row.cost.peak_gpu_memory for row in made.rows["digits"]] == [None, 3e6]

    def test_of_four_seeds_two_are_half(self):
        plan = planned(2, seeds=4)
        curve = lambda one: [{"step": 40, "accuracy": 0.6 if one.seed < 2 else 0.1}]
        score = lambda one: 0.5 if one.method == "m0" or one.seed < 2 else 0.1
        made = concluded(plan, lambda one: done(one, score(one), curve=curve(one)))
        assert made.rows["digits"][1].cost.updates_to_target == 40

    def test_the_last_validation_counts_where_no_look_fell_on_the_end(self):
        made = concluded(planned(2, seeds=4), lambda one: done(one, 0.5, curve=[]))
        cost = made.rows["digits"][0].cost
        assert (cost.reached, cost.updates_to_target) == (4, 60)


class TestRemarks:
    def test_a_teacher_that_labels_alone_do_better_than_is_told(self):
        def made(teacher: float, higher: bool = True):
            plan = planned(["hard", "kd"])
            facts = {
                ("hard", "digits"): plan.entry("hard", "digits").facts.model_copy(update={"higher": higher}),
                ("kd", "digits"): plan.entry("kd", "digits").facts.model_copy(
                    update={"teacher": "abc", "teacher_scores": {"accuracy": teacher}, "higher": higher}
                ),
            }
            return concluded(plan.with_facts(facts), by_method({"hard": BASE, "kd": BASE}))

        weak = "the teacher's validation accuracy (0.500) is no better than that of Hard (0.540)"
        assert [remark.partition(":")[0] for remark in made(0.5).rows["digits"][1].remarks] == [weak]
        assert made(0.6).rows["digits"][1].remarks == []
        assert made(0.5).rows["digits"][0].remarks == []
        assert made(0.5, higher=False).rows["digits"][1].remarks == []
        assert len(made(0.6, higher=False).rows["digits"][1].remarks) == 1

    def test_every_warning_is_told_with_the_seeds_that_it_is_of(self):
        plan = planned(2)
        warned = lambda one: ["all had this", *(["one had this"] if one.seed == 3 else [])]
        made = concluded(plan, lambda one: done(one, 0.5, warnings=warned(one)))
        assert made.rows["digits"][0].remarks == ["all had this", "one had this (seed 3)"]
        made = concluded(plan, lambda one: done(one, 0.5, warnings=[f"loss {one.seed}"]))
        assert made.rows["digits"][0].remarks == [
            "loss 0 (seed 0)", "loss 1 (seed 1)", "loss 2 (seed 2)", "2 more warnings, in the cells' logs",
        ]  # fmt: skip


class TestRanks:
    def test_few_pairs_are_ranked_each_over_its_seeds_and_many_over_their_means(self):
        scores = {"a": BASE, "b": shifted(0.1), "c": shifted(0.2)}
        few = concluded(planned(list(scores), ["one", "two"]), by_method(scores))
        assert [(one.pair, one.ranks.blocks) for one in few.rankings] == [("one", 5), ("two", 5)]
        assert few.rankings[0].ranks.average == {"a": 3.0, "b": 2.0, "c": 1.0}
        many = concluded(planned(list(scores), list("vwxyz")), by_method(scores))
        assert [(one.pair, one.ranks.blocks) for one in many.rankings] == [(None, 5)]

    def test_a_diagram_is_drawn_where_friedmans_test_allows_it_and_not_elsewhere(self):
        steady = {"a": BASE, "b": shifted(0.1), "c": shifted(0.2)}
        made = concluded(planned(list(steady)), by_method(steady))
        # chi2 = 12 n / (k (k + 1)) sum (rank - 2)^2 = 12 * 5 / 12 * 2 = 10 of 2 degrees of freedom: p = exp(-5)
        assert made.rankings[0].ranks.friedman == pytest.approx(math.exp(-5))
        said = words.rank_words(made, made.rankings[0])
        # 3.314 / sqrt(2) * sqrt(3 * 4 / (6 * 5)) = 1.48
        assert "p = 0.007. Average ranks further apart than 1.48 differ at 5 % (Nemenyi)." in said
        shown = page.page(made)
        assert 'aria-label="ranks0"' in shown
        assert "Average ranks further apart than 1.48" in shown
        assert "A, 3.00" in shown or "3.00, A" in shown

        mixed = {"a": [1, 2, 3, 1, 2], "b": [2, 3, 1, 2, 3], "c": [3, 1, 2, 3, 1]}
        made = concluded(planned(list(mixed)), by_method(mixed))
        assert made.rankings[0].ranks.friedman > 0.05
        assert "no difference of ranks is shown" in words.rank_words(made, made.rankings[0])
        assert "Nemenyi)" not in page.page(made)
        assert 'aria-label="ranks0"' not in page.page(made)
        assert "| B | 1.80 |" in text.markdown(made)

    def test_a_method_that_lacks_a_block_is_named_with_the_reason(self):
        scores = {"a": BASE, "b": shifted(0.1), "c": shifted(0.2), "d": BASE, "e": BASE}
        plan = planned(list(scores), ["one", "two"])
        refused = plan.entry("e", "two").facts.model_copy(update={"refused": "has no meaning"})
        facts = {(entry.method, entry.pair): entry.facts for entry in plan.entries}
        plan = plan.with_facts({**facts, ("e", "two"): refused})
        made = concluded(
            plan,
            lambda one: (
                failed(one) if (one.method, one.seed) == ("d", 3) else done(one, scores[one.method][one.seed])
            ),
        )
        assert [one.left_out for one in made.rankings] == [
            {"d": "no score of seed 3"},
            {"d": "no score of seed 3", "e": "not applicable"},
        ]
        assert "Not ranked: D: no score of seed 3; E: not applicable." in page.page(made)
