"""Each baseline's loss against torchdistill's class where it has one, value and gradient; else against a formula by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

from stillhouse.api import IGNORE, Batch, StepInfo, StudentOut, Targets
from stillhouse.errors import ConfigError
from stillhouse.kernels import TopK
from stillhouse_baselines import crd, dist, dkd, fsp, jsd, kd, logit_std, reverse_kl, rs_kd

mid_level = pytest.importorskip("torchdistill.losses.mid_level")
OUTPUT = {"io": "output", "path": "f"}
LOGITS = ("f", "output", "f", "output")
ROWS, CLASSES = 8, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(loss: nn.Module, student: torch.Tensor, teacher: torch.Tensor, **given) -> torch.Tensor:
    return loss({"f": {"output": student}}, {"f": {"output": teacher}}, **given)


def equal(ours: torch.Tensor, theirs: torch.Tensor, *leaves: torch.Tensor, rtol: float = 1e-6) -> None:
    """Value and gradient."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=1e-9)
    for leaf in leaves:
        mine, its = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
        torch.testing.assert_close(mine, its, rtol=100 * rtol, atol=1e-8)
        assert its.abs().max() > 0


def step(method, student, teacher, labels=None, mask=None, **info):
    """The terms of one update of logits."""
    rows = float(len(student) if mask is None else mask.sum())
    known = (
        0.0 if labels is None else float(((labels != IGNORE) & (mask if mask is not None else True)).sum())
    )
    return method.loss_terms(
        StudentOut(student),
        Targets(labels, teacher),
        Batch(student.detach(), labels, mask=mask),
        StepInfo(rows=rows, labelled=known, **info),
    )


# Logits.


@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.9), (1.0, 0.5), (2.0, 1.0)])
def test_kd_is_torchdistills(temperature, alpha):
    """Theirs weighs the labels with alpha, ours the teacher; without the labels theirs leaves out T^2."""
    student, teacher = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1)
    labels = torch.arange(ROWS) % CLASSES
    terms = step(kd.KD(kd.KDConfig(temperature=temperature, alpha=alpha)), student, teacher, labels)
    ours = sum(term.weight * term.value for term in terms.values())
    expected = theirs(
        mid_level.KDLoss(*LOGITS, temperature=temperature, alpha=1 - alpha, beta=alpha),
        student,
        teacher,
        targets=labels,
    )
    equal(ours, expected * (temperature**2 if alpha == 1 else 1), student)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_dist_is_torchdistills(temperature):
    student, teacher = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1)
    terms = step(dist.DIST(dist.DISTConfig(temperature=temperature, inter=2.0, intra=3.0)), student, teacher)
    ours = sum(term.weight * term.value for term in terms.values())
    expected = theirs(mid_level.DISTLoss(*LOGITS, beta=2.0, gamma=3.0, tau=temperature), student, teacher)
    equal(ours, expected, student)


def test_logit_standardisation_is_torchdistills():
    student, teacher = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1)
    labels = torch.arange(ROWS) % CLASSES
    terms = step(logit_std.LogitStd(logit_std.LogitStdConfig(weight=9.0, ce=0.5)), student, teacher, labels)
    ours = sum(term.weight * term.value for term in terms.values())
    loss = mid_level.LogitStdKDLoss(*LOGITS, temperature=2.0, alpha=0.5, beta=9.0)
    equal(ours, theirs(loss, student, teacher, targets=labels), student)


def test_standardised_logits_do_not_depend_on_the_rows_range():
    logits = draw(ROWS, CLASSES)
    torch.testing.assert_close(
        logit_std.standardised(logits * 3 + 2), logit_std.standardised(logits), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.5, 0.0), (0.0, 2.0)])
def test_dkd_is_the_papers_formula(alpha, beta):
    student, teacher = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1)
    labels, temperature = torch.arange(ROWS) % CLASSES, 4.0
    labels[2] = IGNORE
    config = dkd.DKDConfig(alpha=alpha, beta=beta, ce=0.0, temperature=temperature)
    ours = sum(term.weight * term.value for term in step(dkd.DKD(config), student, teacher, labels).values())
    total = torch.zeros((), dtype=torch.float64)
    for own, given, label in zip(student, teacher, labels, strict=True):
        if label == IGNORE:
            continue
        q, p = (own / temperature).softmax(0), (given / temperature).softmax(0)
        rest = torch.arange(CLASSES) != label
        binary = (
            p[label] * (p[label] / q[label]).log() + (1 - p[label]) * ((1 - p[label]) / (1 - q[label])).log()
        )
        r_p, r_q = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        total = total + temperature**2 * (alpha * binary + beta * (r_p * (r_p / r_q).log()).sum())
    equal(ours, total / (ROWS - 1), student)


def test_dkd_with_the_teachers_own_weights_is_kd():
    student, teacher = draw(1, CLASSES).requires_grad_(), draw(1, CLASSES, seed=1)
    labels = torch.tensor([3])
    beta = float(1 - teacher.softmax(-1)[0, 3])
    terms = step(
        dkd.DKD(dkd.DKDConfig(alpha=1.0, beta=beta, ce=0.0, temperature=1.0)), student, teacher, labels
    )
    kd = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    equal(sum(term.weight * term.value for term in terms.values()), kd, student)


def test_dkd_refuses_labels_that_are_no_class_numbers():
    with pytest.raises(ConfigError, match="expected class numbers"):
        step(dkd.DKD(), draw(2, CLASSES), draw(2, CLASSES))


def test_reverse_kl_is_kl_of_the_student_to_the_teacher():
    student, teacher = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1)
    config = reverse_kl.ReverseKLConfig(alpha=1.0, temperature=2.0)
    (term,) = step(reverse_kl.ReverseKL(config), student, teacher).values()
    q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    equal(term.value, 4 * (q * (q.log() - p.log())).sum(-1).mean(), student)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_the_generalised_one(beta):
    student, teacher = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1)
    (term,) = step(jsd.JSD(jsd.JSDConfig(alpha=1.0, beta=beta)), student, teacher).values()
    q, p = student.softmax(-1), teacher.softmax(-1)
    mixed = beta * p + (1 - beta) * q
    by_hand = beta * (p * (p / mixed).log()).sum(-1) + (1 - beta) * (q * (q / mixed).log()).sum(-1)
    equal(term.value, by_hand.mean(), student)


@pytest.mark.parametrize(
    ("method", "config"), [(reverse_kl.ReverseKL, reverse_kl.ReverseKLConfig), (jsd.JSD, jsd.JSDConfig)]
)
def test_labels_have_what_alpha_leaves(method, config):
    student, teacher, labels = draw(ROWS, CLASSES), draw(ROWS, CLASSES, seed=1), torch.arange(ROWS) % CLASSES
    terms = step(method(config(alpha=0.75)), student, teacher, labels)
    assert terms["ce"].weight == pytest.approx(0.25)
    torch.testing.assert_close(terms["ce"].value, F.cross_entropy(student, labels))


def test_sparse_sampling_has_the_gradient_of_kd_in_the_mean():
    student, teacher = draw(2, CLASSES).requires_grad_(), draw(2, CLASSES, seed=1)
    torch.manual_seed(0)
    (term,) = step(rs_kd.RSKD(rs_kd.RSKDConfig(draws=400_000, alpha=1.0)), student, teacher).values()
    gradient = torch.autograd.grad(term.value, student)[0]
    torch.testing.assert_close(
        gradient, ((student.softmax(-1) - teacher.softmax(-1)) / 2).detach(), rtol=0, atol=2e-3
    )


def test_sparse_sampling_takes_draws_and_whole_logits_and_no_top_k():
    student, teacher = draw(2, CLASSES), draw(2, CLASSES, seed=1)
    kept = rs_kd.Sampled(torch.tensor([[1, 1], [0, 2]]), torch.full((2, 2), 0.5))
    (term,) = step(rs_kd.RSKD(rs_kd.RSKDConfig(alpha=1.0)), student, kept).values()
    logs = student.log_softmax(-1)
    torch.testing.assert_close(term.value, -(logs[0, 1] + 0.5 * (logs[1, 0] + logs[1, 2])) / 2)
    with pytest.raises(ConfigError, match="got TopK for the teacher's logits"):
        step(rs_kd.RSKD(), student, TopK.from_logits(teacher, 2))


# Features.


def image_net(channels: int, seed: int) -> nn.Sequential:
    """Inputs ``(B, 2, 8, 8)``: '0' and '2' give ``channels`` maps, '2' at half the resolution."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4),
    )


def set_up(method, *, widths=(4, 4)):
    """A step of the method on image networks, its plugin, and both models' outputs of '0', '2' and '5'."""
    from stillhouse.training.step import DistillStep

    student, teacher = (image_net(width, seed).double() for seed, width in enumerate(widths))
    inputs, labels = draw(ROWS, 2, 8, 8, seed=5), torch.arange(ROWS) % 4
    given = Batch(inputs, labels, torch.arange(ROWS))
    torch.manual_seed(3)
    made = DistillStep(method, student=student, teacher=teacher, probe=given)
    found = []
    for model in (student, teacher):
        values, x = {}, inputs
        for number, layer in enumerate(model):
            x = values[str(number)] = layer(x)
        found.append(values)
    return made, given, found


def gradients(loss, model):
    return torch.cat(
        [
            g.reshape(-1)
            for g in torch.autograd.grad(
                loss, list(model[:3].parameters()), retain_graph=True, materialize_grads=True
            )
        ]
    )


def same_training(made, given, expected, name, rtol=1e-6):
    """The step's term and the gradient of the student's first layers equal those of another loss."""
    student = made.run.student
    out = made(student, given)
    torch.testing.assert_close(out.metrics[name].double(), expected.detach().double(), rtol=rtol, atol=1e-9)
    weight = (
        made.plugins.plugins[0].method.config.weight
        if hasattr(made.plugins.plugins[0].method.config, "weight")
        else 1.0
    )
    theirs = weight * gradients(expected, student)
    torch.testing.assert_close(gradients(out.loss, student), theirs, rtol=100 * rtol, atol=1e-9)
    assert theirs.abs().max() > 0


def test_attention_transfer_is_torchdistills_code_mode():
    made, given, (own, their) = set_up({"name": "at", "layers": {"0": "0", "2": "2"}}, widths=(3, 5))
    pairs = {
        n: {"student": {"io": "output", "path": n}, "teacher": {"io": "output", "path": n}}
        for n in ("0", "2")
    }
    loss = mid_level.ATLoss(pairs, mode="code")
    io = [{n: {"output": values[n]} for n in pairs} for values in (own, their)]
    same_training(made, given, loss(*io), "at.attention")


def test_attention_maps_of_other_sizes_meet_at_the_smaller():
    made, given, (own, their) = set_up({"name": "at", "layers": {"0": "2"}})
    maps = [F.adaptive_avg_pool2d(own["0"].square().mean(1), 4), their["2"].square().mean(1)]
    first, second = (F.normalize(x.flatten(1)) for x in maps)
    same_training(made, given, (first - second).square().mean(), "at.attention")


def test_attention_of_vectors_is_refused():
    with pytest.raises(ConfigError, match=r"at: student.1 gives .*one vector a sample; expected positions"):
        toys.loop(["kd", "at"])


def test_fsp_matrices_are_torchdistills():
    first, second = draw(3, 4, 8, 8).requires_grad_(), draw(3, 5, 4, 4, seed=1).requires_grad_()
    ours, theirs = fsp.flow(first, second), mid_level.FSPLoss.compute_fsp_matrix(first, second)
    torch.testing.assert_close(ours, theirs)
    pull = draw(*ours.shape, seed=2)
    equal((ours * pull).sum(), (theirs * pull).sum(), first, second)


def test_fsp_is_the_squared_error_of_the_matrices():
    made, given, (own, their) = set_up({"name": "fsp", "layers": {"0": "0", "2": "2"}})
    matrices = [mid_level.FSPLoss.compute_fsp_matrix(values["0"], values["2"]) for values in (own, their)]
    same_training(made, given, (matrices[0] - matrices[1]).square().mean(), "fsp.flow")
    assert not list(made.auxiliary["fsp.maps"].module.parameters())


def test_fsp_maps_other_widths_and_takes_a_layer_without_positions():
    made, given, (own, their) = set_up({"name": "fsp", "layers": {"0": "0", "5": "5"}}, widths=(3, 5))
    widen = [m.weight for m in made.auxiliary["fsp.maps"].module]
    matrices = []
    for values, maps in ((own, widen), (their, [torch.eye(5, dtype=torch.float64)] * 2)):
        first = torch.einsum("oc,bchw->bohw", maps[0], values["0"]).amax((2, 3))
        matrices.append(first[:, :, None] * (values["5"] @ maps[1].T)[:, None])
    same_training(made, given, (matrices[0] - matrices[1]).square().mean(), "fsp.flow")


def test_fsp_needs_two_layers():
    with pytest.raises(ConfigError, match="fsp: got 1 layer; expected two or more"):
        toys.loop(["kd", {"name": "fsp", "layers": {"0": "0"}}])


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 0.0), (0.0, 50.0), (1.0, 2.0)])
def test_rkd_is_torchdistills(distance, angle):
    settings = {"name": "rkd", "layers": {"2": "2"}, "distance": distance, "angle": angle}
    made, given, (own, their) = set_up(settings, widths=(3, 5))
    loss = mid_level.RKDLoss("2", "2", distance, angle, "mean")
    expected = loss({"2": {"output": own["2"]}}, {"2": {"output": their["2"]}})
    out = made(made.run.student, given)
    equal(out.loss, expected, *made.run.student[0].parameters())


def test_crd_is_torchdistills(monkeypatch):
    settings = {"name": "crd", "layers": {"5": "5"}, "memory": 20, "negatives": 6, "dim": 4, "momentum": 0.5}
    made, given, (own, their) = set_up(settings, widths=(3, 5))
    plugin = made.plugins.plugins[0].method
    memory, embed = plugin.memory, plugin.embed
    loss = mid_level.CRDLoss("s", "e", "t", 4, 20, 6, 20, temperature=0.07, momentum=0.5)
    loss.memory_v1.copy_(memory.student), loss.memory_v2.copy_(memory.teacher)
    loss.params[2:4] = memory.log_z.exp()
    loss.double()
    drawn = torch.randint(20, (ROWS, 6), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(crd.torch, "randint", lambda *given: drawn)
    positive = given.ids
    student, teacher = F.normalize(embed["student"](own["5"])), F.normalize(embed["teacher"](their["5"]))
    expected = loss(
        {
            "s": {"output": student},
            "e": {"input": {"pos_idx": positive, "contrast_idx": torch.cat([positive[:, None], drawn], 1)}},
        },
        {"t": {"output": teacher}},
    ).sum()
    # The memory is kept in float32.
    same_training(made, given, expected, "crd.contrast", rtol=1e-5)
    made.end_update()
    torch.testing.assert_close(memory.student.double(), loss.memory_v1, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(memory.teacher.double(), loss.memory_v2, rtol=1e-5, atol=1e-6)


def test_crds_memory_moves_once_an_update_and_not_in_evaluation():
    made, given, _ = set_up({"name": "crd", "memory": 20, "negatives": 6, "dim": 4})
    memory = made.plugins.plugins[0].method.memory
    before = memory.student.clone()
    with torch.no_grad():
        made(made.run.student, Batch(given.inputs, given.labels, given.ids + 10))
    parts = [given.part(slice(0, 3)), given.part(slice(3, 8))]
    made.begin_update(parts)
    for part in parts:
        made(made.run.student, part)
    assert torch.equal(memory.student, before)
    made.end_update()
    moved = (memory.student != before).any(1)
    assert moved.tolist() == [row < ROWS for row in range(20)]


def test_crd_keeps_the_rows_of_the_two_splits_apart():
    made = toys.loop(["kd", "crd"])
    method = made.step.plugins.plugins[1].method
    sizes = len(made.splits.train), len(made.splits.unlabelled)
    assert len(method.memory.student) == sum(sizes)
    ranges = {data: method._range(crd.Stage("any", data=data)) for data in ("labelled", "unlabelled", "all")}
    assert ranges == {"labelled": (0, sizes[0]), "unlabelled": sizes, "all": (0, sum(sizes))}


def test_crd_refuses_batches_whose_samples_have_no_number():
    model = toys.net()
    from stillhouse.training.step import DistillStep

    with pytest.raises(ConfigError, match=r"crd: got batches, and not the data.*expected memory"):
        DistillStep(["kd", "crd"], student=model, teacher=toys.net(seed=2), probe=toys.rows(4))
    with pytest.raises(ConfigError, match="expected 'ids'"):
        DistillStep(
            ["kd", {"name": "crd", "memory": 9}], student=model, teacher=toys.net(seed=2), probe=toys.rows(4)
        )
