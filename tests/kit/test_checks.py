"""Each conformance check catches a plugin that breaks what it asks for, and passes one that does not."""

from __future__ import annotations

import random
import re

import pytest
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import nn

from stillhouse import catalog
from stillhouse.api import (
    Auxiliary,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    Observer,
    Splits,
    Task,
    TensorSplit,
    hookimpl,
)
from stillhouse.errors import ConfigError, PluginError
from stillhouse.kernels import softmax_kl
from stillhouse.methods import loaded
from stillhouse.testing import Subject, checks_for, outcomes, subject_of, toy_splits, toy_student

pytest_plugins = ["pytester"]


class Good(Method):
    """Knowledge distillation, with a trained weight on the term."""

    api_version = 1
    conformance = Conformance(minimum={"kl": 0.0})

    @hookimpl
    def auxiliary_modules(self):
        self.gain = nn.Linear(1, 1)
        return {"gain": self.gain}

    @hookimpl
    def loss_terms(self, student_out, targets, batch, step):
        logits = student_out.logits
        kl = softmax_kl(logits, targets.soft, mask=batch.mask, count=step.rows)
        pull = (self.gain(torch.ones(1, 1)) - 1).square().mean() * step.share
        return {"kl": LossTerm(kl), "pull": LossTerm(pull)}


class Broken(Method):
    api_version = 1

    def term(self, student_out, targets, batch, step):
        return softmax_kl(student_out.logits, targets.soft, mask=batch.mask, count=step.rows)

    @hookimpl
    def loss_terms(self, student_out, targets, batch, step):
        return {"kl": LossTerm(self.term(student_out, targets, batch, step))}


class NoGradient(Broken):
    def term(self, student_out, targets, batch, step):
        return student_out.logits.new_zeros((), requires_grad=True) * 1


class TrainsTheTeacher(Broken):
    @hookimpl
    def on_run_start(self, run):
        run.teacher.requires_grad_(True)


class TeacherInTrainMode(Broken):
    @hookimpl
    def on_run_start(self, run):
        run.teacher.train()


class WritesToTheTeacher(Broken):
    @hookimpl
    def on_run_end(self, run):
        pass

    @hookimpl
    def on_stage_end(self, run):
        next(run.teacher.parameters()).data.add_(1)


class Overflows(Broken):
    def term(self, student_out, targets, batch, step):
        return step.mean(student_out.logits.exp().pow(4).sum(-1), batch.mask)


class OverflowsInBf16(Broken):
    def term(self, student_out, targets, batch, step):
        right = student_out.logits.dtype == torch.float32
        return super().term(student_out, targets, batch, step) * (1.0 if right else float("nan"))


class NeedsTwoRows(Broken):
    def term(self, student_out, targets, batch, step):
        return super().term(student_out, targets, batch, step) / student_out.logits[:, 0].std().clamp(max=1.0)


class ForgetsTheMask(Broken):
    def term(self, student_out, targets, batch, step):
        finite = student_out.logits.nan_to_num(posinf=50.0)
        return softmax_kl(finite, targets.soft.nan_to_num(posinf=50.0), count=step.rows)


class MeansOverAllRows(Broken):
    def term(self, student_out, targets, batch, step):
        return softmax_kl(student_out.logits, targets.soft, mask=batch.mask, count=len(batch)) / step.micros


class MeansOverTheMicroBatch(Broken):
    def term(self, student_out, targets, batch, step):
        return softmax_kl(student_out.logits, targets.soft, mask=batch.mask)


class OwnRandomNumbers(Broken):
    def term(self, student_out, targets, batch, step):
        generator = torch.Generator()
        generator.seed()
        return super().term(student_out, targets, batch, step) * (1 + torch.rand((), generator=generator))


class WrongMinimum(Broken):
    conformance = Conformance(minimum={"kl": 0.5})


class NotAMinimum(Broken):
    conformance = Conformance(minimum={"kl": 0.0})

    def term(self, student_out, targets, batch, step):
        return -super().term(student_out, targets, batch, step)


class DeclaresAnotherTerm(Broken):
    conformance = Conformance(minimum={"k1": 0.0})


class WritesToTheBatch(Broken):
    def term(self, student_out, targets, batch, step):
        batch.inputs.data.mul_(1.5)  # past the version counter
        return super().term(student_out, targets, batch, step)


class AddsToTheBatch(Broken):
    def term(self, student_out, targets, batch, step):
        batch.extra["mine"] = torch.zeros(1)
        return super().term(student_out, targets, batch, step)


KEPT: list = []


class KeepsTheGraphElsewhere(Broken):
    def term(self, student_out, targets, batch, step):
        KEPT.append(student_out.logits)
        return super().term(student_out, targets, batch, step)


class NeedsLabelsInSecret(Broken):
    def term(self, student_out, targets, batch, step):
        return F.cross_entropy(student_out.logits, targets.labels.clamp(min=0)) * step.share


class ReadsIgnoredLabels(Broken):
    def term(self, student_out, targets, batch, step):
        if targets.labels is None:
            return super().term(student_out, targets, batch, step)
        return student_out.logits.gather(1, targets.labels[:, None]).mean() * step.share


class NeedsFeaturesInSecret(Broken):
    @hookimpl
    def on_run_start(self, run):
        run.capture("student", "body")


class UpdatesInSecret(Broken):
    @hookimpl
    def student_update(self, student, optimizer, loss, step):
        return False


class NeedsNoLabels(Broken):
    requires = frozenset({"logits", "labels"})


class NeedsNoFeatures(Broken):
    requires = frozenset({"logits", "hidden_states"})


class NeedsNoLogits(Broken):
    def term(self, student_out, targets, batch, step):
        return step.mean(student_out.logits.square().mean(-1), batch.mask)


class NeedsNoLogitsBesideFeatures(NeedsNoLogits):
    requires = frozenset({"logits", "hidden_states"})

    @hookimpl
    def on_run_start(self, run):
        run.capture("teacher", "body")


class OpenConfig(MethodConfig):
    model_config = ConfigDict(extra="ignore")


class TakesUnknownSettings(Broken):
    Config = OpenConfig


class NoDefault(MethodConfig):
    weight: float


class HasNoDefault(Broken):
    Config = NoDefault


class Lossy(MethodConfig):
    rate: float = Field(0.1, exclude=True)


class ForgetsASetting(Broken):
    Config = Lossy
    conformance = Conformance(settings={"rate": 0.7})


class Forgets(Broken):
    """Its loss depends on how many steps it has seen, and it saves nothing."""

    seen = 0

    def term(self, student_out, targets, batch, step):
        self.seen += 1
        return super().term(student_out, targets, batch, step) * self.seen


class SavesAnObject(Broken):
    @hookimpl
    def state_dict(self):
        return {"lock": random.Random(1)}


class HidesAModule(Broken):
    @hookimpl
    def on_run_start(self, run):
        self.heads = {"mine": nn.Linear(2, 2)}


class ModuleThatIsNotTrained(Broken):
    @hookimpl
    def auxiliary_modules(self, run):
        return {"idle": Auxiliary(nn.Linear(2, 2))}


BREAKS = [
    (NoGradient, "gradient_reaches_the_student", "no weight of the student changed"),
    (TrainsTheTeacher, "teacher_is_untouched", "unfroze the teacher's 'body.weight'"),
    (TeacherInTrainMode, "teacher_is_untouched", "train mode"),
    (WritesToTheTeacher, "teacher_is_untouched", "teacher's weights or buffers were written to"),
    (Overflows, "finite_in_float32", "in fp32 with logits around 60: "),
    (OverflowsInBf16, "finite_in_bf16", "in bf16 with logits around 60: "),
    (NeedsTwoRows, "takes_a_batch_of_one", "with one sample in a batch: .* = nan"),
    (ForgetsTheMask, "masked_rows_are_ignored", "use batch.mask"),
    (MeansOverAllRows, "masked_rows_are_ignored", "divide by step.rows"),
    (MeansOverTheMicroBatch, "micro_batches_do_not_matter", "multiply by step.share"),
    (OwnRandomNumbers, "same_seed_same_bits", "expected the same bits"),
    (WrongMinimum, "student_equal_to_teacher_gives_the_minimum", "it declares 0.5"),
    (NotAMinimum, "student_equal_to_teacher_gives_the_minimum", "for another student; it declares 0 as"),
    (DeclaresAnotherTerm, "student_equal_to_teacher_gives_the_minimum", "its terms are .*kl"),
    (WritesToTheBatch, "batch_is_untouched", "changed batch.inputs in place"),
    (AddsToTheBatch, "batch_is_untouched", "keys of batch.extra"),
    (KeepsTheGraphElsewhere, "no_graph_is_kept", "are alive after the run"),
    (NeedsLabelsInSecret, "declared_capabilities_suffice", "without .*labels.* it fails with AttributeError"),
    (NeedsFeaturesInSecret, "declared_capabilities_suffice", "does not require 'hidden_states'"),
    (UpdatesInSecret, "declared_capabilities_suffice", "does not require 'student_update'"),
    (NeedsNoLabels, "declared_capabilities_are_needed", "requires 'labels' and runs the same without"),
    (NeedsNoFeatures, "declared_capabilities_are_needed", "requires 'hidden_states' and runs the same"),
    (NeedsNoLogits, "declared_capabilities_are_needed", "requires 'logits' and runs the same"),
    (NeedsNoLogitsBesideFeatures, "declared_capabilities_are_needed", "requires 'logits' and runs the same"),
    (NeedsLabelsInSecret, "works_without_labels", "where no row has one it fails"),
    (ReadsIgnoredLabels, "works_without_labels", "where half of the rows"),
    (TakesUnknownSettings, "config_round_trips", "expected extra='forbid'"),
    (HasNoDefault, "config_round_trips", "expected a default for every field"),
    (ForgetsASetting, "config_round_trips", "came back as"),
    (Forgets, "resumes_bit_exact", "give what lasts .* in state_dict"),
    (SavesAnObject, "resumes_bit_exact", "can't be read from a checkpoint"),
    (HidesAModule, "auxiliary_modules_are_found_trained_and_saved", r"self\.heads\.mine is a Linear"),
    (ModuleThatIsNotTrained, "auxiliary_modules_are_found_trained_and_saved", "'broken.idle' did not change"),
]


def in_process(kind: type) -> list:
    """Every check but the one that needs a process of its own."""
    return [check for check in checks_for(subject_of(kind)) if check.name != "import_does_no_work"]


def outcome(kind: type, check: str, entry: catalog.Entry | None = None):
    subject = Subject(kind, "broken", "acme 1.2", getattr(kind, "conformance", Conformance()), entry)
    (only,) = [one for one in checks_for(subject) if one.name == check]
    (found,) = outcomes([only])
    return found


@pytest.mark.parametrize(
    ("kind", "check", "message"), BREAKS, ids=[f"{k.__name__}-{c}" for k, c, _ in BREAKS]
)
def test_the_check_catches_a_plugin_that_breaks_it(kind, check, message):
    found = outcome(kind, check)
    assert found.status == "failed"
    assert found.message.startswith("plugin 'broken' (acme 1.2): ")
    assert re.search(message, found.message), found.message


def test_a_good_plugin_passes_them_all():
    found = list(outcomes(in_process(Good)))
    assert [(one.check.name, one.message) for one in found if one.status != "passed"] == [
        ("listing_imports_nothing", "no installed entry point names it")
    ]


IMPORTS = {
    "print('hello')": "printed 'hello'",
    "import torch; torch.manual_seed(0)": "seeded or drew from torch's",
    "import random; random.random()": "seeded or drew from python's",
    "import numpy; numpy.random.rand()": "seeded or drew from numpy's",
    "import tempfile; tempfile.TemporaryFile('w')": "for writing",
    "import torch; torch.set_default_dtype(torch.float64)": "changed torch's default type",
    "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()": "started a thread",
    "import subprocess; subprocess.run(['true'])": "called subprocess.Popen",
}


@pytest.mark.slow
@pytest.mark.parametrize("work", IMPORTS)
def test_an_import_that_works_is_caught(install, work):
    _import_is_caught(install, work)


def test_an_import_that_prints_is_caught(install):
    _import_is_caught(install, "print('hello')")


def _import_is_caught(install, work: str) -> None:
    install(
        "acme",
        "[stillhouse.methods]\nmine = busy_mine:Mine\n",
        busy_mine=f"""
        {work}
        from stillhouse.api import Method
        class Mine(Method):
            api_version = 1
        """,
    )
    entry = catalog.find("method", "mine")
    kind = type("Mine", (Method,), {"api_version": 1, "__module__": "busy_mine"})
    found = outcome(kind, "import_does_no_work", entry)
    assert found.status == "failed"
    assert found.message.startswith("plugin 'broken' (acme 1.2): importing 'busy_mine' ")
    assert IMPORTS[work] in found.message


def test_a_distribution_that_imports_at_listing_is_caught(install, monkeypatch):
    site = install(
        "acme",
        "[stillhouse.methods]\nmine = eager_mine:Mine\n",
        eager_mine="""
        class Mine: ...
        """,
    )
    (site / "sitecustomize.py").write_text("import eager_mine\n")
    found = outcome(Good, "listing_imports_nothing", catalog.find("method", "mine"))
    assert (found.status, "listing imports 'eager_mine'" in found.message) == ("failed", True)


def test_an_installed_plugin_lists_and_imports_quietly():
    entry = catalog.find("method", "kd")
    assert outcome(loaded(entry), "listing_imports_nothing", entry).status == "passed"
    assert outcome(loaded(entry), "import_does_no_work", entry).status == "passed"


# Tasks and observers.


class Toys(Task):
    """The toys as a task."""

    api_version = 1
    teachers = {"toy": lambda: toy_student()}
    students = {"toy": lambda: toy_student()}

    def splits(self):
        return toy_splits()


class Drifts(Toys):
    def splits(self):
        data = toy_splits()
        data.train = TensorSplit(torch.randn(32, 8), data.train.labels)
        return data


class Unseeded(Toys):
    def splits(self):
        generator = torch.Generator()
        generator.seed()
        return Splits(TensorSplit(torch.randn(32, 8, generator=generator), toy_splits().train.labels))


class Leaks(Toys):
    def splits(self):
        data = toy_splits()
        data.unlabelled = data.test.without_labels()
        return data


class HasNan(Toys):
    def splits(self):
        data = toy_splits()
        data.train.inputs[3] = float("nan")
        return data


class NoIds(Toys):
    def splits(self):
        class Anonymous(TensorSplit):
            def batch(self, index):
                return super().batch(torch.zeros_like(index))

        data = toy_splits()
        data.train = Anonymous(data.train.inputs, data.train.labels)
        return data


class TooNarrow(Toys):
    students = {"narrow": lambda: nn.Linear(8, 3)}


class LowerIsBetter(Toys):
    def score(self, outputs, labels):
        return {"accuracy": -super().score(outputs, labels)["accuracy"]}


class OtherMetric(Toys):
    metric = "f1"


class Quiet(Observer):
    """Watches."""

    api_version = 1


class StartsOnce(Quiet):
    def on_run_start(self, record):
        (record.dir / "mine").mkdir()


class Meddles(Quiet):
    def on_metrics(self, row):
        torch.rand(1)


class Trains(Quiet):
    def on_metrics(self, row):
        import gc

        for found in gc.get_objects():
            if issubclass(type(found), nn.Linear):  # isinstance() asks dead weak references
                found.weight.data.mul_(1.01)


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (Drifts, "splits_are_the_same_each_time", "draws from torch's global random numbers"),
        (Unseeded, "splits_are_the_same_each_time", "two calls of splits\\(\\) made different rows"),
        (Leaks, "test_rows_are_in_no_other_split", "16 rows of the test split stand in the unlabelled"),
        (HasNan, "splits_are_sound", "NaN"),
        (NoIds, "splits_are_sound", "expected the row numbers"),
        (TooNarrow, "models_fit_the_data", "student 'narrow' gives outputs of shape"),
        (LowerIsBetter, "metric_is_scored_and_higher_is_better", "expected more for the right ones"),
        (OtherMetric, "metric_is_scored_and_higher_is_better", "expected 'f1'"),
        (StartsOnce, "survives_a_run_and_a_resume", "FileExistsError"),
        (Trains, "training_is_unchanged", "read and change nothing"),
    ],
)
def test_checks_of_tasks_and_observers_catch_what_breaks_them(kind, check, message):
    found = outcome(kind, check)
    assert found.status == "failed"
    assert re.search(message, found.message), found.message


@pytest.mark.parametrize("kind", [Toys, Quiet])
def test_a_good_task_and_a_good_observer_pass(kind):
    found = list(outcomes(in_process(kind)))
    assert [(one.check.name, one.message) for one in found if one.bad] == []


# Expected failures.


def declared(kind: type, **failures: str) -> type:
    return type(kind.__name__, (kind,), {"conformance": Conformance(expected_failures=failures)})


def test_an_expected_failure_is_no_failure_and_gives_its_reason():
    kind = declared(MeansOverTheMicroBatch, micro_batches_do_not_matter="relates the rows of a batch")
    found = outcome(kind, "micro_batches_do_not_matter")
    assert (found.status, found.message, found.bad) == ("expected", "relates the rows of a batch", False)


def test_an_expected_failure_that_passes_is_one():
    found = outcome(declared(Broken, batch_is_untouched="not yet"), "batch_is_untouched")
    assert (found.status, found.bad) == ("unexpected", True)
    assert "not yet" in found.message


def test_an_expected_failure_of_no_check_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no check 'batch_untouched'; did you mean 'batch_is_untouched'"):
        checks_for(subject_of(declared(Broken, batch_untouched="typo")))


def test_what_is_no_plugin_is_refused():
    with pytest.raises(PluginError, match="expected a subclass of Method, Task or Observer"):
        checks_for(subject_of(dict))


TESTS = """
from stillhouse.api import Conformance, LossTerm, Method, hookimpl
from stillhouse.testing import parametrize_with_checks

class Mine(Method):
    api_version = 1
    requires = frozenset()
    conformance = Conformance(expected_failures={failures})

    @hookimpl
    def loss_terms(self, student_out, batch, step):
        return {{"mine": LossTerm(student_out.logits.square().mean())}}

@parametrize_with_checks(Mine)
def test_conformance(check):
    check()
"""


@pytest.mark.parametrize(
    ("failures", "counts"),
    [
        ({}, {"failed": 2}),
        ({"masked_rows_are_ignored": "a", "micro_batches_do_not_matter": "b"}, {"xfailed": 2}),
        (
            {"masked_rows_are_ignored": "a", "micro_batches_do_not_matter": "b", "same_seed_same_bits": "c"},
            {"xfailed": 2, "failed": 1},
        ),
    ],
)
def test_under_pytest_expected_failures_are_strict_xfails(pytester, failures, counts):
    pytester.makepyfile(TESTS.format(failures=repr(failures)))
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "--deselect", "none", "-k", "masked or micro or same_seed or batch_is"
    )
    found = result.parseoutcomes()
    assert {name: found.get(name, 0) for name in ("failed", "xfailed")} == {
        "failed": 0,
        "xfailed": 0,
        **counts,
    }
    assert found["passed"] == 4 - sum(counts.values())


@pytest.mark.slow
def test_the_command_ends_with_1_where_a_plugin_has_to_be_mended(install, cli):
    source = TESTS.format(failures="{}").split("@parametrize")[0]
    install("acme", "[stillhouse.methods]\nmine = checked_mine:Mine\n", checked_mine=source)
    said = cli("plugins", "check", "mine")
    assert said.code == 1
    assert "failed     masked_rows_are_ignored: plugin 'mine' (acme 1.2)" in said.out
    assert said.out.splitlines()[-1].startswith("method plugin 'mine' (acme 1.2): ")
