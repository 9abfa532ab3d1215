"""Methods that each break what one conformance check asks for, one that breaks nothing, and a way to try them."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import nn

from stillhouse.api import Auxiliary, Conformance, LossTerm, Method, MethodConfig, hookimpl
from stillhouse.kernels import softmax_kl
from stillhouse.plugin import catalog
from stillhouse.testing import Outcome, Subject, checks_for, outcomes, subject_of


class Good(Method):
    """Knowledge distillation, with a trained weight on the term."""

    api_version = 1
    conformance = Conformance(minimum={"kl": 0.0})

    @hookimpl
    def auxiliary_modules(self):
        self.gain = nn.Linear(1, 1)
        return {"gain": self.gain}

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        logits = student_out.logits
        kl = softmax_kl(logits, targets.soft, mask=batch.mask, count=info.rows)
        pull = (self.gain(torch.ones(1, 1)) - 1).square().mean() * info.share
        return {"kl": LossTerm(kl), "pull": LossTerm(pull)}


class Broken(Method):
    api_version = 1

    def term(self, student_out, targets, batch, info):
        return softmax_kl(student_out.logits, targets.soft, mask=batch.mask, count=info.rows)

    @hookimpl
    def loss_terms(self, student_out, targets, batch, info):
        return {"kl": LossTerm(self.term(student_out, targets, batch, info))}


class NoGradient(Broken):
    def term(self, student_out, targets, batch, info):
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
    def term(self, student_out, targets, batch, info):
        return info.mean(student_out.logits.exp().pow(4).sum(-1), batch.mask)


class OverflowsInBf16(Broken):
    def term(self, student_out, targets, batch, info):
        right = student_out.logits.dtype == torch.float32
        return super().term(student_out, targets, batch, info) * (1.0 if right else float("nan"))


class NeedsTwoRows(Broken):
    def term(self, student_out, targets, batch, info):
        return super().term(student_out, targets, batch, info) / student_out.logits[:, 0].std().clamp(max=1.0)


class ForgetsTheMask(Broken):
    def term(self, student_out, targets, batch, info):
        finite = student_out.logits.nan_to_num(posinf=50.0)
        return softmax_kl(finite, targets.soft.nan_to_num(posinf=50.0), count=info.rows)


class MeansOverAllRows(Broken):
    def term(self, student_out, targets, batch, info):
        return softmax_kl(student_out.logits, targets.soft, mask=batch.mask, count=len(batch)) / info.micros


class MeansOverTheMicroBatch(Broken):
    def term(self, student_out, targets, batch, info):
        return softmax_kl(student_out.logits, targets.soft, mask=batch.mask)


class MeanOfTheMicroBatchesMeans(Broken):
    """Right for micro-batches that are even."""

    def term(self, student_out, targets, batch, info):
        return softmax_kl(student_out.logits, targets.soft, mask=batch.mask) / info.micros


class DrawsNoise(Broken):
    """Breaks nothing: what it draws differs from row to row."""

    def noisy(self, student_out):
        return student_out.logits + torch.randn_like(student_out.logits)

    def term(self, student_out, targets, batch, info):
        return softmax_kl(self.noisy(student_out), targets.soft, mask=batch.mask, count=info.rows)


class DrawsNoiseAndMeansOverTheMicroBatch(DrawsNoise):
    def term(self, student_out, targets, batch, info):
        return softmax_kl(self.noisy(student_out), targets.soft, mask=batch.mask) / info.micros


class OwnRandomNumbers(Broken):
    def term(self, student_out, targets, batch, info):
        generator = torch.Generator()
        generator.seed()
        return super().term(student_out, targets, batch, info) * (1 + torch.rand((), generator=generator))


class ComparesPadding(Broken):
    """Takes padding for rows, where the batch has positions."""

    def term(self, student_out, targets, batch, info):
        if student_out.logits.dim() == 2:
            return super().term(student_out, targets, batch, info)
        return info.mean(student_out.logits.nan_to_num(posinf=5.0).square().mean(-1))


class ComparesTheSentencesMiddle(Broken):
    """Its place depends on the padding."""

    @hookimpl
    def on_run_start(self, run):
        self.place = run.probe.mask.shape[1] // 2 if run.kind.positions else None

    def term(self, student_out, targets, batch, info):
        if self.place is None:
            return super().term(student_out, targets, batch, info)
        kept = torch.arange(batch.mask.shape[1]) >= self.place
        return softmax_kl(student_out.logits, targets.soft, mask=batch.mask & kept, count=info.rows)


class WrongMinimum(Broken):
    conformance = Conformance(minimum={"kl": 0.5})


class NotAMinimum(Broken):
    conformance = Conformance(minimum={"kl": 0.0})

    def term(self, student_out, targets, batch, info):
        return -super().term(student_out, targets, batch, info)


class DeclaresAnotherTerm(Broken):
    conformance = Conformance(minimum={"k1": 0.0})


class WritesToTheBatch(Broken):
    def term(self, student_out, targets, batch, info):
        batch.inputs.data.mul_(1.5)  # past the version counter
        return super().term(student_out, targets, batch, info)


class AddsToTheBatch(Broken):
    def term(self, student_out, targets, batch, info):
        batch.extra["mine"] = torch.zeros(1)
        return super().term(student_out, targets, batch, info)


KEPT: list = []


class KeepsTheGraphElsewhere(Broken):
    def term(self, student_out, targets, batch, info):
        KEPT.append(student_out.logits)
        return super().term(student_out, targets, batch, info)


class NeedsLabelsInSecret(Broken):
    def term(self, student_out, targets, batch, info):
        return F.cross_entropy(student_out.logits, targets.labels.clamp(min=0)) * info.share


class ReadsIgnoredLabels(Broken):
    def term(self, student_out, targets, batch, info):
        if targets.labels is None:
            return super().term(student_out, targets, batch, info)
        return student_out.logits.gather(1, targets.labels[:, None]).mean() * info.share


class NeedsFeaturesInSecret(Broken):
    @hookimpl
    def on_run_start(self, run):
        run.capture("student", "body")


class UpdatesInSecret(Broken):
    @hookimpl
    def student_update(self, student, optimizer, loss, info):
        return False


class NeedsNoLabels(Broken):
    requires = frozenset({"logits", "labels"})


class NeedsNoFeatures(Broken):
    requires = frozenset({"logits", "hidden_states"})


class NeedsNoLogits(Broken):
    def term(self, student_out, targets, batch, info):
        return info.mean(student_out.logits.square().mean(-1), batch.mask)


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

    def term(self, student_out, targets, batch, info):
        self.seen += 1
        return super().term(student_out, targets, batch, info) * self.seen


class NeedsTheData(Broken):
    @hookimpl
    def on_run_start(self, run):
        self.rows = len(run.splits.train)


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


class ForgetsItsModule(Good):
    """Starts its trained module anew on a resume."""

    @hookimpl
    def state_dict(self):
        return {"seen": 1}

    @hookimpl
    def load_state_dict(self, state):
        self.gain.reset_parameters()


BREAKS = [
    (NoGradient, "gradient_reaches_the_student", "no weight of the student changed"),
    (TrainsTheTeacher, "teacher_is_untouched", "unfroze the teacher's 'body.weight'"),
    (TeacherInTrainMode, "teacher_is_untouched", "train mode"),
    (WritesToTheTeacher, "teacher_is_untouched", "teacher's weights or buffers were written to"),
    (Overflows, "finite_in_float32", "in fp32 with logits around 60: "),
    (OverflowsInBf16, "finite_in_bf16", "in bf16 with logits around 60: "),
    (NeedsTwoRows, "takes_a_batch_of_one", "with one sample in a batch: .* = nan"),
    (ForgetsTheMask, "masked_rows_are_ignored", "use batch.mask"),
    (MeansOverAllRows, "masked_rows_are_ignored", "divide by info.rows"),
    (MeansOverTheMicroBatch, "micro_batches_do_not_matter", "multiply by info.share"),
    (MeanOfTheMicroBatchesMeans, "micro_batches_do_not_matter", "gradient of 3 uneven micro-batches"),
    (
        DrawsNoiseAndMeansOverTheMicroBatch,
        "micro_batches_do_not_matter",
        "gradient of 3 uneven micro-batches",
    ),
    (ComparesPadding, "padding_counts_nowhere", "with 3 pads more .*use batch.mask"),
    (ComparesTheSentencesMiddle, "padding_counts_nowhere", "with pads on the left"),
    (MeansOverTheMicroBatch, "ragged_micro_batches_do_not_matter", "1 and 3 sentences, 6 and 5 tokens long"),
    (NeedsTheData, "works_in_another_loop", "AttributeError: 'NoneType' object has no attribute 'train'"),
    (Forgets, "works_in_another_loop", "saved after update 1 .* give what lasts"),
    (ModuleThatIsNotTrained, "works_in_another_loop", "what is trained beside it \\(broken.idle\\) was not"),
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
    (
        ForgetsItsModule,
        "auxiliary_modules_are_found_trained_and_saved",
        "did not come back from a checkpoint",
    ),
    (ModuleThatIsNotTrained, "auxiliary_modules_are_found_trained_and_saved", "'broken.idle' did not change"),
]


def in_process(kind: type) -> list:
    """Every check but the one that needs a process of its own."""
    return [check for check in checks_for(subject_of(kind)) if check.name != "import_does_no_work"]


def outcome(kind: type, check: str, entry: catalog.Entry | None = None) -> Outcome:
    subject = Subject(kind, "broken", "acme 1.2", getattr(kind, "conformance", Conformance()), entry)
    (only,) = [one for one in checks_for(subject) if one.name == check]
    (found,) = outcomes([only])
    return found
