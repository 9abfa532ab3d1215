"""Refusals say got, expected and fix, and are the same on every backend."""

import numpy as np
import pytest
import torch

from stillhouse.kernels import Sampled, TeacherHead, TopK, linear_softmax_kl, softmax_kl

S, T = torch.zeros(4, 5), torch.zeros(4, 5)
INDEX = torch.tensor([[0, 1]] * 4)
LOG = torch.tensor([[0.5, 0.3]] * 4).log()


def indices(*row):
    return torch.tensor([row] * 4)


CASES = {
    "a top k of none": (lambda b: TopK.from_logits(T, 0), "TopK.from_logits k"),
    "a top k of more than there are": (lambda b: TopK.from_logits(T, 6), "TopK.from_logits k: got 6"),
    "a top k at temperature 0": (lambda b: TopK.from_logits(T, 2, temperature=0.0), "from_logits temperature"),
    "a top k of yes": (lambda b: TopK.from_logits(T, True), "TopK.from_logits k"),
    "draws from nothing": (lambda b: Sampled.from_logits(torch.zeros(3, 0), 3), "Sampled.from_logits logits"),
    "a top k in words": (lambda b: TopK.from_logits(T, "2"), "TopK.from_logits k"),
    "draws at no temperature": (lambda b: Sampled.from_logits(T, 2, temperature=None), "from_logits temperature"),
    "no draws": (lambda b: Sampled.from_logits(T, 0), "Sampled.from_logits k"),
    "draws from NaN": (lambda b: Sampled.from_logits(T * torch.nan, 2), "NaN.* in row 0"),
    "rows that differ": (lambda b: softmax_kl(S, torch.zeros(3, 5), backend=b), "target shape"),
    "a missing dimension": (lambda b: softmax_kl(S, torch.zeros(5), backend=b), "target shape"),
    "rows that would broadcast": (lambda b: softmax_kl(S, torch.zeros(1, 5), backend=b), "target shape"),
    "integer logits": (lambda b: softmax_kl(S.long(), T, backend=b), "student_logits dtype"),
    "integer teacher": (lambda b: softmax_kl(S, T.int(), backend=b), "target dtype"),
    "no tensor": (lambda b: softmax_kl(S, [[0.0]], backend=b), "target"),
    "no columns": (lambda b: softmax_kl(torch.zeros(4, 0), T, backend=b), "student_logits shape"),
    "temperature 0": (lambda b: softmax_kl(S, T, temperature=0.0, backend=b), "temperature"),
    "temperature below 0": (lambda b: softmax_kl(S, T, temperature=-1.0, backend=b), "temperature"),
    "temperature NaN": (lambda b: softmax_kl(S, T, temperature=float("nan"), backend=b), "temperature"),
    "temperature infinite": (lambda b: softmax_kl(S, T, temperature=float("inf"), backend=b), "temperature"),
    "an unknown divergence": (lambda b: softmax_kl(S, T, divergence="kl", backend=b), "divergence"),
    "a temperature beyond float32": (lambda b: softmax_kl(S, T, temperature=1e300, backend=b), "temperature"),
    "a temperature below float32": (lambda b: softmax_kl(S, T, temperature=1e-300, backend=b), "temperature"),
    "beta near the end": (lambda b: softmax_kl(S, T, divergence="jsd", beta=1e-8, backend=b), "beta"),
    "beta at the end": (lambda b: softmax_kl(S, T, divergence="jsd", beta=1.0, backend=b), "beta"),
    "an unknown reduction": (lambda b: softmax_kl(S, T, reduction="batchmean", backend=b), "reduction"),
    "a count without a mean": (lambda b: softmax_kl(S, T, reduction="sum", count=3, backend=b), "count"),
    "a count below 0": (lambda b: softmax_kl(S, T, count=-1, backend=b), "count"),
    "a count tensor below 0": (lambda b: softmax_kl(S, T, count=torch.tensor(-1), backend=b), "count"),
    "a count tensor of NaN": (lambda b: softmax_kl(S, T, count=torch.tensor(torch.nan), backend=b), "count"),
    "a count in words": (lambda b: softmax_kl(S, T, count="4", backend=b), "count"),
    "a temperature in words": (lambda b: softmax_kl(S, T, temperature="2", backend=b), "temperature"),
    "no temperature": (lambda b: softmax_kl(S, T, temperature=None, backend=b), "temperature"),
    "no beta": (lambda b: softmax_kl(S, T, divergence="jsd", beta=None, backend=b), "beta"),
    "a top-k without a temperature": (
        lambda b: softmax_kl(S, TopK(INDEX, LOG, temperature=None), backend=b), "TopK.temperature"),
    "sparse logits": (lambda b: softmax_kl(S.to_sparse(), T, backend=b), "student_logits layout"),
    "a sparse teacher": (lambda b: softmax_kl(S, T.to_sparse(), backend=b), "target layout"),
    "a leaf in place": (lambda b: softmax_kl(S.clone().requires_grad_(), T, inplace=True, backend=b), "inplace"),
    "a view of a leaf in place": (
        lambda b: softmax_kl(S.clone().requires_grad_().view(4, 5), T, inplace=True, backend=b), "inplace.*view"),
    "a count with a shape": (lambda b: softmax_kl(S, T, count=torch.ones(2), backend=b), "count"),
    "a mask of another shape": (lambda b: softmax_kl(S, T, mask=torch.ones(4, 5).bool(), backend=b), "mask shape"),
    "a mask of integers": (lambda b: softmax_kl(S, T, mask=torch.ones(4), backend=b), "mask dtype"),
    "another device": (lambda b: softmax_kl(S, T.to("meta"), backend=b), "target device"),
    "an index too large": (lambda b: softmax_kl(S, TopK(indices(0, 5), LOG), backend=b), "TopK.indices"),
    "an index below 0": (lambda b: softmax_kl(S, TopK(indices(-1, 2), LOG), backend=b), "TopK.indices"),
    "a repeated index": (lambda b: softmax_kl(S, TopK(indices(2, 2), LOG), backend=b), "TopK.indices"),
    "probabilities for logs": (lambda b: softmax_kl(S, TopK(INDEX, LOG.exp()), backend=b), "TopK.log_probs"),
    "NaN log-probabilities": (lambda b: softmax_kl(S, TopK(INDEX, LOG * torch.nan), backend=b), "TopK.log_probs"),
    "an unknown rest": (lambda b: softmax_kl(S, TopK(INDEX, LOG, rest="drop"), backend=b), "TopK.rest"),
    "a ghost moved": (lambda b: softmax_kl(S, TopK(INDEX, LOG), temperature=2.0, backend=b), "TopK.temperature"),
    "a rest that does not fit": (lambda b: softmax_kl(S, TopK(INDEX, LOG, log_rest=LOG[:, 0] * 0), backend=b),
        "TopK.log_rest"),
    "a rest of NaN": (lambda b: softmax_kl(S, TopK(INDEX, LOG, log_rest=LOG[:, 0] * torch.nan), backend=b),
        "TopK.log_rest"),
    "a rest of another shape": (lambda b: softmax_kl(S, TopK(INDEX, LOG, log_rest=LOG), backend=b),
        "TopK.log_rest shape"),
    "a rest of none": (lambda b: softmax_kl(S, TopK(INDEX, LOG, "renormalise", log_rest=LOG[:, 0]), backend=b),
        "TopK.log_rest"),
    "32-bit indices": (lambda b: softmax_kl(S, TopK(INDEX.int(), LOG), backend=b), "TopK.indices dtype"),
    "k above V": (lambda b: softmax_kl(S[:, :1], TopK(INDEX, LOG), backend=b), "TopK k"),
    "unequal shapes": (lambda b: softmax_kl(S, TopK(INDEX, LOG[:, :1]), backend=b), "TopK shapes"),
    "negative weights": (lambda b: softmax_kl(S, Sampled(INDEX, indices(2.0, -1.0)), backend=b), "Sampled.weights"),
    "weights that do not sum": (lambda b: softmax_kl(S, Sampled(INDEX, indices(1.0, 1.0)), backend=b), "Sampled.weights"),
    "a sample out of range": (lambda b: softmax_kl(S, Sampled(indices(0, 9), indices(0.5, 0.5)), backend=b), "Sampled.indices"),
    "samples backwards": (
        lambda b: softmax_kl(S, Sampled(INDEX, indices(0.5, 0.5)), divergence="reverse", backend=b), "divergence"),
    "samples moved": (
        lambda b: softmax_kl(S, Sampled(INDEX, indices(0.5, 0.5)), temperature=2.0, backend=b), "Sampled.temperature"),
    "in place on a leaf": (lambda b: softmax_kl(torch.zeros(4, 5, requires_grad=True), T, inplace=True, backend=b), "inplace"),
    "NaN logits": (lambda b: softmax_kl(S.clone().index_fill_(0, torch.tensor(2), torch.nan), T, backend=b), "NaN.*row 2"),
    "infinite logits": (lambda b: softmax_kl(S.clone().index_fill_(0, torch.tensor(1), torch.inf), T, backend=b), "NaN.*row 1"),
    "no finite logit": (lambda b: softmax_kl(S, T.clone().index_fill_(0, torch.tensor(3), -torch.inf), backend=b), "NaN.*row 3"),
    "one NaN in a teacher": (lambda b: softmax_kl(S, T.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)), backend=b), "NaN.*row 1"),
    "layers that do not fit": (lambda b: linear_softmax_kl(torch.zeros(4, 3), torch.zeros(5, 2), T, backend=b), "layer shapes"),
    "a bias of another size": (
        lambda b: linear_softmax_kl(torch.zeros(4, 3), torch.zeros(5, 3), T, bias=torch.zeros(4), backend=b), "bias shape"),
    "a layer of another type": (
        lambda b: linear_softmax_kl(torch.zeros(4, 3), torch.zeros(5, 3).double(), T, backend=b), "weight dtype"),
    "a layer without outputs": (
        lambda b: linear_softmax_kl(torch.zeros(4, 3), torch.zeros(0, 3), TeacherHead(S, T), backend=b), "weight shape"),
    "a layer without inputs": (
        lambda b: linear_softmax_kl(torch.zeros(4, 0), torch.zeros(5, 0), torch.zeros(4, 5), backend=b), "weight shape"),
    "a teacher without outputs": (
        lambda b: linear_softmax_kl(torch.zeros(4, 3), torch.zeros(5, 3), TeacherHead(S, T[:0]), backend=b),
        "teacher weight shape"),
    "a teacher on another device": (
        lambda b: linear_softmax_kl(
            torch.zeros(4, 3), torch.zeros(5, 3), TeacherHead(S.to("meta"), T.to("meta")), backend=b),
        "teacher hidden device"),
    "a mask that is a list": (
        lambda b: linear_softmax_kl(torch.zeros(4, 3), torch.zeros(5, 3), T, mask=[True] * 4, backend=b), "mask dtype"),
    "a teacher of other rows": (
        lambda b: linear_softmax_kl(
            torch.zeros(4, 3), torch.zeros(5, 3), TeacherHead(torch.zeros(2, 3), torch.zeros(5, 3)), backend=b),
        "teacher hidden shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_alike_on_every_backend(case):
    call, what = CASES[case]
    messages = set()
    for backend in ("numba", "torch"):
        with pytest.raises(ValueError, match=what) as refusal:
            call(backend)
        messages.add(str(refusal.value))
    (message,) = messages
    assert "got" in message
    assert "expected" in message
    assert "Fix:" in message


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("divergence", "rest"), [("forward", "ghost"), ("reverse", "renormalise")])
def test_a_trusted_index_out_of_range_is_still_an_error(divergence, rest, backend):
    target = TopK(indices(0, 5_000_000), LOG, rest, trusted=True)
    why = r"row 0.*trusted" if backend == "numba" else r"TopK.indices: got 5000000; expected 0 to"
    with pytest.raises(ValueError, match=why):
        softmax_kl(S, target, divergence=divergence, backend=backend)
    with pytest.raises(ValueError, match=why):
        linear_softmax_kl(S, torch.eye(S.shape[1]), target, divergence=divergence, backend=backend)


@pytest.mark.parametrize("beta", [1.0, -1.0, None])
def test_a_beta_that_nothing_reads_is_not_looked_at(beta):
    expected = softmax_kl(S, S + 1)
    for divergence in ("forward", "reverse"):
        assert softmax_kl(S, S + 1, divergence=divergence, beta=beta) == expected
        assert (
            linear_softmax_kl(S, torch.eye(S.shape[1]), S + 1, divergence=divergence, beta=beta) == expected
        )


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_trusted_top_k_without_mass_is_refused(backend, divergence):
    target = TopK(torch.tensor([[0, 1]]), torch.full((1, 2), -torch.inf), "renormalise", trusted=True)
    with pytest.raises(ValueError, match="got NaN"):
        softmax_kl(torch.zeros(1, 5), target, divergence=divergence, backend=backend)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("rest", ["ghost", "renormalise"])
@pytest.mark.parametrize("k", [3, 16, 20])
@pytest.mark.parametrize("infinite", ["nowhere", "at an entry", "outside"])
def test_a_trusted_top_k_that_is_not_a_number_is_refused(infinite, k, rest, divergence):
    """Taken for a probability of zero it would make a reverse loss +inf; so may the others, which is not to hide it."""
    log_probs, at = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1).topk(k)
    student = torch.zeros(4, 50)
    log_probs[2, 1] = torch.nan
    if infinite == "at an entry":
        student[2, at[2, 0]] = log_probs[2, 2] = -torch.inf
    nothing = (
        infinite == "outside" and rest == "ghost"
    )  # a student that has some is infinitely far in reverse
    log_rest = torch.full((4,), -torch.inf) if nothing else None
    with pytest.raises(ValueError, match="got NaN"):
        softmax_kl(student, TopK(at, log_probs, rest, trusted=True, log_rest=log_rest), divergence=divergence)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_trusted_rest_that_is_not_a_number_is_refused(backend, divergence):
    """And not taken for one that was not given."""
    target = TopK.from_logits(torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), 5)
    target.log_rest[2] = torch.nan
    with pytest.raises(ValueError, match=r"got NaN.*row 2"):
        softmax_kl(torch.zeros(4, 50), target, divergence=divergence, backend=backend)


def test_a_student_without_mass_at_the_k_entries_is_told_so():
    student = torch.zeros(1, 5)
    student[0, :2] = -torch.inf
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log(), "renormalise")
    with pytest.raises(ValueError, match="logits at the k entries: got"):
        softmax_kl(student, target, divergence="reverse", backend="numba")


def test_an_index_out_of_range_is_told_beside_a_row_that_is_infinite_or_counts_for_nothing():
    student = torch.zeros(2, 6)
    student[0, 2] = -torch.inf
    target = TopK(torch.tensor([[2, 1], [0, 99]]), torch.tensor([[0.5, 0.2]] * 2).log(), trusted=True)
    for settings in ({}, {"count": 0}):
        with pytest.raises(ValueError, match=r"target indices.*row 1"):
            softmax_kl(student, target, backend="numba", **settings)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_an_infinite_loss_that_counts_for_nothing_is_zero(count, backend):
    student = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    loss = softmax_kl(student, torch.zeros(1, 2), count=count, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_logits_that_a_refused_call_overwrote_are_known_to_be_gone():
    """Or what saved them for backward would go on with the wrong ones, in silence."""
    leaf = torch.randn(3, 5, requires_grad=True)
    logits, teacher = leaf.exp(), torch.zeros(3, 5)
    teacher[2] = torch.nan
    with pytest.raises(ValueError, match="logits: got NaN"):
        softmax_kl(logits, teacher, inplace=True, backend="numba")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_a_target_in_the_logits_memory_is_not_overwritten():
    """Also where torch knows of two tensors and of nothing that they share."""
    memory = np.random.default_rng(0).standard_normal(36, dtype="float32")
    base, teacher = torch.from_numpy(memory[:24]).view(4, 6), torch.from_numpy(memory[12:]).view(4, 6)
    assert base.untyped_storage().data_ptr() != teacher.untyped_storage().data_ptr()
    kept = memory.copy()
    logits = _Same.apply(torch.zeros(1, requires_grad=True), base)
    softmax_kl(logits, teacher, inplace=True, backend="numba").backward()
    assert (memory == kept).all()


class _Same(torch.autograd.Function):
    """Logits as of a layer, in memory that is given."""

    @staticmethod
    def forward(ctx, weight, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.sum().view(1), None


def test_a_logit_that_stands_for_minus_infinity_does_so_for_samples():
    student = torch.tensor([[0.0, torch.finfo(torch.float32).min]])
    target = Sampled(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    assert softmax_kl(student, target, backend="numba").isposinf()


@pytest.mark.parametrize(("backend", "why"), [("triton", "backend"), ("cuda", "backend='cuda'")])
def test_a_backend_that_cannot_run_is_refused(backend, why):
    with pytest.raises(ValueError, match=why):
        softmax_kl(S, T, backend=backend)
    with pytest.raises(ValueError, match="float64"):
        softmax_kl(S.double(), T, backend="numba")


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_counts_may_be_numpys(backend):
    student, teacher = torch.eye(4, 5), torch.zeros(4, 5)
    wanted = softmax_kl(student, teacher, count=7, backend=backend)
    assert torch.equal(softmax_kl(student, teacher, count=np.int64(7), backend=backend), wanted)
    assert torch.equal(softmax_kl(student, teacher, count=np.float32(7), backend=backend), wanted)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_sample_of_weight_0_may_stand_on_an_impossible_entry(backend):
    """0 times log 0 counts as 0, so it is no NaN on one path and a number on the other."""
    student = torch.tensor([[1.0, -torch.inf, 0.5]]).requires_grad_()
    target = Sampled(torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]))
    loss = softmax_kl(student, target, backend=backend)
    loss.backward()
    assert torch.allclose(loss, -student.log_softmax(-1)[0, 0])
    assert torch.allclose(student.grad, student.softmax(-1) - torch.tensor([[1.0, 0.0, 0.0]]))
