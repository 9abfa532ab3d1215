"""IBMD: closed forms, the bottleneck's known solutions, what is frozen, what is refused."""

from __future__ import annotations

import json
import math

import pytest
import resuming
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.distributions import Normal, kl_divergence

from stillhouse.api import Batch, Splits, StepInfo, StudentOut, Targets, TeacherOut, TensorSplit
from stillhouse.errors import ConfigError
from stillhouse_ibmd import IBMD, Encoder, Gaussian, GaussianDecoder, IBMDConfig, divergence, rate

QUICK = {"name": "ibmd", "dim": 4}
AUXILIARY = ("ibmd.teacher_encoder", "ibmd.student_encoder", "ibmd.decoder")


def gaussian(seed: int, rows: int = 5, dim: int = 3) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(*(torch.randn(rows, dim, generator=generator) for _ in range(2)))


def as_normal(code: Gaussian) -> Normal:
    return Normal(code.mean, (0.5 * code.log_variance).exp())


def loop(method=QUICK, **more):
    torch.manual_seed(0)
    return toys.loop(method, **more)


# Closed forms.


def test_the_rate_is_the_closed_form_to_the_standard_normal():
    code = gaussian(0)
    expected = kl_divergence(as_normal(code), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(rate(code), expected)
    assert rate(Gaussian(torch.zeros(2, 3), torch.zeros(2, 3))).tolist() == [0.0, 0.0]


def test_the_divergence_is_the_closed_form_between_two_gaussians():
    p, q = gaussian(1), gaussian(2)
    torch.testing.assert_close(divergence(p, q), kl_divergence(as_normal(p), as_normal(q)).sum(-1))
    assert divergence(p, p).abs().max() < 1e-6
    assert not torch.allclose(divergence(p, q), divergence(q, p)), "it has a direction"


def test_a_draw_has_the_mean_and_the_variance_of_its_code():
    torch.manual_seed(0)
    code = Gaussian(torch.full((200_000, 1), 2.0), torch.full((200_000, 1), math.log(0.25)))
    drawn = code.sample()
    assert float(drawn.mean()) == pytest.approx(2.0, abs=0.01)
    assert float(drawn.var()) == pytest.approx(0.25, abs=0.01)


def test_the_gaussian_decoders_variance_ends_at_the_mean_squared_error():
    """Variational information distillation's known answer."""
    torch.manual_seed(0)
    decoder, codes = GaussianDecoder(2, 1), torch.randn(512, 2)
    wanted = codes @ torch.tensor([[1.0], [-2.0]]) + 0.7 * torch.randn(512, 1)
    optimizer = torch.optim.LBFGS(decoder.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = decoder.distortion(codes, wanted).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    error = (decoder(codes) - wanted).square().mean()
    error = error.detach()
    assert float(decoder.log_variance.detach().exp()) == pytest.approx(float(error), rel=1e-3)
    at_best = 0.5 * math.log(2 * math.pi * math.e * float(error))
    assert float(decoder.distortion(codes, wanted).mean().detach()) == pytest.approx(at_best, rel=1e-3)


# The bottleneck.


def squared_correlation_of_the_code(beta: float, r: float = 0.8) -> float:
    """corr(x, z)^2 after training a linear encoder and a Gaussian decoder on pairs of correlation r."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(1, 1), GaussianDecoder(1, 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        x = torch.randn(1024, 1)
        y = r * x + math.sqrt(1 - r * r) * torch.randn(1024, 1)
        code = encoder(x)
        loss = (decoder.distortion(encoder.code(code), y) + beta * rate(code)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        code = encoder(torch.randn(50_000, 1))
    signal, noise = float(code.mean.var()), float(code.log_variance.exp().mean())
    return signal / (signal + noise)


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_the_linear_gaussian_bottleneck_keeps_what_theory_says(beta):
    r = 0.8
    expected = (r**2 - beta) / (r**2 * (1 - beta))
    assert squared_correlation_of_the_code(beta) == pytest.approx(expected, abs=0.03)


def test_the_linear_gaussian_bottleneck_collapses_once_beta_exceeds_the_squared_correlation():
    assert squared_correlation_of_the_code(0.75) < 0.01


def test_a_large_beta_drives_the_rates_to_zero():
    rates = []
    for beta in (1e4, 0.0):
        made = loop(
            {**QUICK, "beta": beta, "gamma": 0.0, "shares": (1, 1e-9)}, steps=250, optimizer={"lr": 1e-2}
        )
        made.run()
        rates.append([made.watcher.metrics[-1][f"ibmd.rate_{side}"] for side in ("teacher", "student")])
    (squeezed, free) = rates
    assert max(squeezed) < 0.02
    assert min(free) > 0.2


def terms_of(config: IBMDConfig, student_features, teacher_features):
    """Loss terms of stage bottleneck for features that are handed over."""
    made = loop(IBMD(config), steps=4)
    method = made.step.plugins.plugins[0].method
    torch.manual_seed(0)
    logits = torch.zeros(len(student_features), toys.CLASSES, requires_grad=True)
    teacher_logits = torch.randn(len(student_features), toys.CLASSES)
    step = StepInfo(stage=made.step.stages[0], rows=float(len(student_features)))
    terms = method.loss_terms(
        StudentOut(logits, {method._pairs[0].student.name: student_features}),
        TeacherOut(teacher_logits, {method._pairs[0].teacher.name: teacher_features}),
        Targets(None, teacher_logits),
        Batch(torch.zeros(len(student_features), toys.FEATURES)),
        step,
    )
    return method, terms


def test_without_noise_and_without_beta_it_is_feature_distillation():
    """KL(e_T || e_S) is half the squared distance of the projected features, as FitNets' hint loss."""
    config = IBMDConfig(dim=4, beta=0.0, gamma=1.0, deterministic=True)
    student = torch.randn(6, 8, requires_grad=True)
    teacher = torch.randn(6, 16)
    method, terms = terms_of(config, student, teacher)
    gradient = torch.autograd.grad(terms["match"].value, student, retain_graph=True)[0]
    projected = [
        F.linear(given / side.scale, side.net.weight, side.net.bias)
        for side, given in ((method.encode_student[0], student), (method.encode_teacher[0], teacher))
    ]
    hint = 0.5 * (projected[0] - projected[1]).square().sum(-1).mean()
    torch.testing.assert_close(terms["match"].value, hint)
    torch.testing.assert_close(gradient, torch.autograd.grad(hint, student)[0])
    assert all(terms[f"rate_{side}"].weight == 0 for side in ("teacher", "student"))
    assert terms["match"].weight == 1.0
    code = method.encode_student[0](student)
    assert torch.equal(method.encode_student[0].code(code), code.mean), "no noise"


def test_rate_and_distortion_are_logged_in_nats_whatever_the_temperature():
    student, teacher = torch.randn(6, 8), torch.randn(6, 16)
    config = IBMDConfig(dim=4, temperature=3.0, deterministic=True)
    method, terms = terms_of(config, student, teacher)
    torch.manual_seed(0)
    p = F.softmax(torch.randn(6, toys.CLASSES) / 3, -1)
    log_q = F.log_softmax(method.decode(method.encode_student[0](student).mean) / 3, -1)
    expected = (p * (p.log() - log_q)).sum(-1).mean()
    torch.testing.assert_close(terms["distortion_student"].value, expected, rtol=1e-4, atol=1e-6)
    assert terms["distortion_student"].weight == 9.0, "the objective holds T^2 times it"
    torch.testing.assert_close(terms["rate_student"].value, rate(method.encode_student[0](student)).mean())


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_scaled_encoder_begins_as_the_plain_one_and_moves_less_by_the_root_of_the_width(hidden):
    features, width, moved = torch.rand(16, 400), 400, []
    for scaled in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(width, 4, hidden, scaled=scaled)
        before = encoder(features).mean.detach()
        first = encoder.net[0] if hidden else encoder.net
        optimizer = torch.optim.Adam([first.weight], lr=1e-5)  # so small that a ReLU stays on its side
        encoder(features).mean.sum().backward()
        optimizer.step()
        moved.append((before, (encoder(features).mean.detach() - before).abs().mean()))
    (plain, far), (same, near) = moved
    torch.testing.assert_close(plain, same)
    assert float(far / near) == pytest.approx(math.sqrt(width), rel=0.05)


def test_a_wide_teachers_code_does_not_leap_in_the_first_updates():
    """A leap of the teacher's code is one of the match, and what the student does to follow kills its units."""
    made = loop({**QUICK, "dim": 32}, steps=30, teacher=toys.net(512), optimizer={"lr": 0.016})
    made.run(made.lengths[0])
    assert max(metrics["ibmd.rate_teacher"] for metrics in made.watcher.metrics) < 10  # 40 where it leaps


# What is trained, what is frozen.


@pytest.mark.parametrize("train_student", [True, False])
def test_each_stage_trains_what_it_says_and_leaves_the_rest_bit_for_bit(train_student):
    made = loop({**QUICK, "train_student": train_student})
    length, models, teacher = made.lengths[0], made.step.run.models, toys.weights(made.step.teacher)
    start = {name: toys.weights(model) for name, model in models.items()}
    made.run(length)
    after = {name: toys.weights(model) for name, model in models.items()}
    assert toys.same_bits(start["student"], after["student"]) is not train_student
    assert not any(toys.same_bits(start[name], after[name]) for name in AUXILIARY)
    assert toys.same_bits(made.step.teacher, teacher)
    made.run()
    assert all(toys.same_bits(models[name], after[name]) for name in AUXILIARY), "the shared module is fixed"
    assert not toys.same_bits(models["student"], after["student"])
    assert toys.same_bits(made.step.teacher, teacher)


def test_the_student_is_optimised_through_the_frozen_encoder_too():
    through, alone = loop({**QUICK, "gamma": 0.0}), loop({**QUICK, "gamma": 0.0, "weight": 0.0})
    for made in (through, alone):
        made.run()
    assert not toys.same_bits(through.model, alone.model)
    tied = loop({**QUICK, "gamma": 1.0})
    tied.run()
    assert not toys.same_bits(tied.model, through.model), "gamma ties the student's code to the teacher's"


@pytest.mark.parametrize("at", [2, 4, 5, 9], ids=["in bottleneck", "between", "first of target", "in target"])
def test_resumes_bit_for_bit_in_every_stage(at):
    make = lambda: loop(scheduler="CosineAnnealingLR")
    unbroken = make()
    unbroken.run()
    taken = resuming.taken_up(make, at)
    assert resuming.same(unbroken, taken)
    tables = [made.step.plugins.plugins[0].method.plane.table() for made in (unbroken, taken)]
    assert torch.equal(tables[0].nan_to_num(-1), tables[1].nan_to_num(-1)), "the information plane goes on"


CONFIG = {
    "task": {"name": "digits", "labelled": 100, "unlabelled": 150, "validation": 60},
    "teacher": {"name": "mlp", "hidden": 24, "train": {"steps": 30}},
    "student": {"name": "mlp", "hidden": 8},
    "method": {"name": "ibmd", "dim": 4},
    "steps": 30,
    "batch_size": 16,
    "log_every": 5,
    "checkpoint_every": 4,
    "threads": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, forks):
    run = resuming.Run(tmp_path_factory.mktemp("ibmd"), forks, CONFIG)
    assert run.go() == 0, run.said()
    return run


@pytest.mark.parametrize("update", [7, 19], ids=["bottleneck", "target"])
def test_killed_and_resumed_it_ends_with_the_same_bits(update, finished, tmp_path, forks):
    run = resuming.Run(tmp_path, forks, CONFIG)
    run.killed_after(update)
    assert run.go("--resume") == 0, run.said()
    assert run.weights == finished.weights
    name = "information_plane.csv"
    assert (run.out / name).read_text() == (finished.out / name).read_text()


def test_a_run_directory_holds_the_information_plane_and_the_manifest_the_projections(finished):
    lines = (finished.out / "information_plane.csv").read_text().splitlines()
    assert lines[0] == "step,stage,rate_teacher,distortion_teacher,rate_student,distortion_student"
    assert len(lines) == 31, "every update"
    assert (finished.out / "information_plane.png").read_bytes()[:4] == b"\x89PNG"
    chosen = json.loads((finished.out / "manifest.json").read_text())["chosen"]
    assert chosen["ibmd.projection.teacher"]["value"].endswith("24 -> 4")
    assert chosen["ibmd.projection.student"]["value"].endswith("8 -> 4")
    rows = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "ibmd.rate_student" in row][-1]
    assert float(lines[-1].split(",")[4]) == pytest.approx(last["ibmd.rate_student"], rel=1e-4)


# Where it applies.


def test_works_without_labels():
    made = loop(data=toys.splits(labels=False))
    made.run()
    assert set(made.watcher.metrics[-1]) == {
        f"ibmd.{name}" for name in ("distortion_student", "rate_student", "match", "head")
    } | {"loss"}


def test_with_other_outputs_than_the_teachers_the_head_learns_from_labels_alone():
    made = loop(teacher=toys.net(16, seed=2, outputs=7))
    made.run()
    assert "ibmd.head" not in made.watcher.metrics[-1]
    assert "ibmd.labels" in made.watcher.metrics[-1]
    assert made.step.run.models["ibmd.decoder"].out_features == 7
    with pytest.raises(ConfigError, match="7 outputs, the student 4, and the data no labels"):
        loop(teacher=toys.net(16, seed=2, outputs=7), data=toys.splits(labels=False))


class Convolutional(nn.Module):
    """Its penultimate layer gives ``(B, channels, positions)``."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv1d(1, 3, 2), nn.Linear(15, toys.CLASSES)

    def forward(self, inputs):
        return self.head(self.convolution(inputs[:, None]).flatten(1))


def test_features_of_any_shape_with_a_row_for_each_output_are_flattened():
    made = loop(teacher=Convolutional())
    made.run()
    assert made.step.run.chosen["ibmd.projection.teacher"]["value"] == "convolution: 15 -> 4"


def regression_data() -> Splits:
    x = toys.rows(48, 1)[0]
    return Splits(TensorSplit(x, x[:, :1] - 2 * x[:, 1:2]), validation=TensorSplit(x[:8], x[:8, :1]))


def test_regression_has_a_gaussian_decoder_and_squared_errors():
    made = loop(
        student=toys.net(8, seed=1, outputs=1),
        teacher=toys.net(16, seed=2, outputs=1),
        data=regression_data(),
    )
    assert isinstance(made.step.run.models["ibmd.decoder"], GaussianDecoder)
    assert [stage.data for stage in made.step.stages] == ["labelled", "labelled"]
    made.run()
    assert math.isfinite(made.watcher.metrics[-1]["loss"])


def test_micro_batches_give_the_same_loss_where_nothing_is_drawn():
    whole, parts = (
        loop({**QUICK, "deterministic": True}, steps=3, micro_batch_size=size) for size in (None, 3)
    )
    for made in (whole, parts):
        made.run()
    for ours, theirs in zip(whole.watcher.metrics, parts.watcher.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


# What is refused.


def test_a_module_that_does_not_exist_is_refused_with_the_nearest_names(cli, tmp_path):
    (tmp_path / "run.yaml").write_text(
        json.dumps({**CONFIG, "method": {"name": "ibmd", "layers": {"2": "11"}}})
    )
    said = cli("run", "run.yaml", "teacher.train.steps=1")
    assert said.code != 0
    assert "teacher.11: no such module in Sequential; did you mean" in said.err
    assert "Traceback" not in said.err


class OtherRows(nn.Module):
    """A module whose output has no row for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Flatten(0), nn.Linear(toys.FEATURES, toys.CLASSES)

    def forward(self, inputs):
        return self.head(self.mix(inputs).view(-1, toys.FEATURES))


def test_a_shape_that_cannot_be_projected_is_refused():
    with pytest.raises(
        ConfigError, match=r"student.mix gives torch.float32 of shape \(24,\); expected floats \(B, ...\)"
    ):
        loop({**QUICK, "layers": {"mix": "1"}}, student=OtherRows())


def test_a_model_without_a_layer_before_its_head_is_refused():
    with pytest.raises(ConfigError, match="no module before its head"):
        loop(student=nn.Sequential(nn.Linear(toys.FEATURES, toys.CLASSES)))


def test_a_negative_beta_is_refused(cli):
    said = cli("run", "mnist1d-ibmd", "method.beta=-0.1")
    assert said.code != 0
    assert "method.beta" in said.err
    assert "-0.1" in said.err
