"""Which path computes, and the way back where a kernel can't be had."""

import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import exact, logits, relative
from numba.core import compiler

from stillhouse.cli.main import main
from stillhouse.kernels import (
    TopK,
    backends,
    cache,
    distillation_loss,
    linear_softmax_kl,
    loss,
    selfcheck,
    softmax_kl,
)
from stillhouse.kernels.cpu import build, workers


def forget():
    for known in (backends.cpu_failure, backends._say_failed, build.entry, build._made):
        known.cache_clear()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As in a new process of a user without a cache."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def no_compiler(name):
    raise ImportError(f"cannot import name 'JITCodeLibrary' for {name}")


def test_without_a_kernel_torch_computes_and_says_so_once(fresh, monkeypatch):
    monkeypatch.setattr(build, "_compile", no_compiler)
    student, teacher = logits(64, 200, 1), logits(64, 200, 2)
    leaf = student.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            loss = softmax_kl(leaf, teacher, temperature=2.0)
    (one,) = [str(w.message) for w in said]
    assert said[0].filename == __file__
    assert "JITCodeLibrary" in one
    assert "backend='torch'" in one
    rows, gradient = exact(student, teacher, temperature=2.0)
    assert relative(loss.detach(), rows.mean()) <= 1e-6
    assert relative(torch.autograd.grad(loss, leaf)[0], gradient) <= 1e-6
    assert one.count("Fix: ") == 1
    assert ".." not in one
    with pytest.raises(
        ValueError, match=r"backend='numba': got ImportError.*JITCodeLibrary.*Fix: backend='torch'"
    ):
        softmax_kl(leaf, teacher, backend="numba")


def test_both_terms_have_the_way_back_too(fresh, monkeypatch):
    monkeypatch.setattr(build, "_compile", no_compiler)
    student, teacher, labels = logits(64, 200, 1), logits(64, 200, 2), torch.arange(64)
    for target in (teacher, TopK.from_logits(teacher, 8)):
        backends._say_failed.cache_clear()
        with pytest.warns(RuntimeWarning, match="torch computes in their place"):
            got = distillation_loss(student, target, labels)
        expected = distillation_loss(student, target, labels, backend="torch")
        assert torch.equal(got.soft, expected.soft)
        assert torch.equal(got.label, expected.label)


PROGRAM = """
import warnings
import torch
from numba.core import codegen, compiler
for name in {gone}:
    for owner in (codegen.JITCodeLibrary, codegen.JITCPUCodegen, codegen, compiler):
        if name in vars(owner):
            delattr(owner, name)
from stillhouse.kernels import distillation_loss
layer = torch.nn.Linear(20, 200)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
x, teacher, y = torch.randn(64, 20), torch.randn(64, 200), torch.arange(64)
losses = []
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(20):
        loss = sum(distillation_loss(layer(x), teacher, y, temperature=4.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(losses[-1] < 0.9 * losses[0], len(said), str(said[0].message)[:60])
"""


@pytest.mark.parametrize(
    "gone", [["JITCodeLibrary"], ["JITCPUCodegen"], ["_finalize_specific", "add_ir_module"]]
)
def test_it_trains_where_numbas_private_names_are_gone(gone, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(gone=gone)],
        env={**os.environ, "STILLHOUSE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.startswith("True 1 stillhouse's CPU kernels can't"), done.stdout + done.stderr


def test_a_line_before_the_first_compilation(fresh, monkeypatch, caplog):
    def compiles(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "compile_extra", compiles)
    with caplog.at_level(logging.WARNING, "stillhouse.kernels"), pytest.raises(KeyboardInterrupt):
        build.entry("dense")
    assert "about 25 seconds" in caplog.text
    caplog.clear()
    monkeypatch.setattr(build, "_codegen", lambda: no_compiler("dense"))
    for kernel in build.ENTRIES:  # which fails at once
        assert "JITCodeLibrary" in backends.cpu_failure(kernel)
    assert not caplog.records


def test_what_was_compiled_is_kept(fresh, monkeypatch):
    monkeypatch.setattr(build, "_compile", lambda name: b"code")
    monkeypatch.setattr(build, "_load", lambda code: code)
    assert build.entry("dense") == b"code"
    forget()
    monkeypatch.setattr(build, "_compile", no_compiler)
    assert build.entry("dense") == b"code"
    assert build.kept("dense")
    assert not build.kept("sparse")


def test_threads_wait_for_the_one_that_compiles(fresh, monkeypatch):
    made, all_there = [], threading.Barrier(4)

    def compiles(name):
        made.append(name)
        time.sleep(0.2)
        return b"code"

    def asks():
        all_there.wait()
        build.entry("dense")

    monkeypatch.setattr(build, "_compile", compiles)
    monkeypatch.setattr(build, "_load", lambda code: code)
    monkeypatch.setattr(cache, "write", lambda name, code: False)
    threads = [threading.Thread(target=asks) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["dense"]


def test_doctor_says_that_torch_computes_where_a_kernel_cannot_be_had(fresh, monkeypatch, capsys):
    assert "not compiled yet: dense, dense_labels, sparse, sparse_labels" in backends.explain("cpu")[1]
    monkeypatch.setattr(build, "_compile", no_compiler)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor", "--kernels"]) == 1
    printed = capsys.readouterr().out
    assert "kernel backend torch: " in printed
    assert "FAILED kernel: the CPU kernels can't be compiled or loaded: ImportError" in printed


def test_small_calls_compile_nothing_whatever_is_there(fresh, monkeypatch):
    """By their size alone: what was compiled before does not change a result."""
    monkeypatch.setattr(build, "_compile", no_compiler)
    rows = loss.SMALL // 10
    student, teacher = logits(rows, 10, 1), logits(rows, 10, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = softmax_kl(student, teacher, temperature=4.0)
        both = distillation_loss(student, teacher, torch.zeros(rows, dtype=torch.long), temperature=4.0)
        eye = torch.eye(10)
        by_layer = linear_softmax_kl(student, eye, teacher, temperature=4.0)
    assert relative(got, exact(student, teacher, temperature=4.0)[0].mean()) <= 1e-6
    assert torch.equal(both.soft, got)
    assert relative(by_layer, got) <= 1e-6
    with pytest.warns(RuntimeWarning):
        softmax_kl(logits(rows + 1, 10, 1), logits(rows + 1, 10, 2))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_small_calls_are_right(reduction):
    mask = torch.arange(40) % 4 != 0
    student, teacher = logits(40, 12, 1), logits(40, 12, 2)
    student[0], teacher[4] = torch.nan, torch.inf
    teacher[1, 3] = student[1, 3] = -torch.inf
    leaf = student.clone().requires_grad_()
    settings = {"temperature": 0.5, "mask": mask, "reduction": reduction}
    got = softmax_kl(leaf, teacher, **settings)
    s = torch.where(mask[:, None], student, 0)
    t = torch.where(mask[:, None], teacher, 0)
    rows, gradient = exact(s, t, temperature=0.5, mask=mask)
    rows, gradient = torch.where(mask, rows, 0), gradient * mask.sum()
    if reduction == "mean":
        rows, gradient = rows.sum() / mask.sum(), gradient / mask.sum()
    elif reduction == "sum":
        rows = rows.sum()
    assert relative(got.detach(), rows) <= 1e-6
    assert relative(torch.autograd.grad(got.sum(), leaf)[0], gradient) <= 1e-6


def test_warmup_makes_every_kernel_and_keeps_it(fresh, monkeypatch):
    made, said = [], []
    monkeypatch.setattr(build, "_compile", lambda name: made.append(name) or name.encode())
    monkeypatch.setattr(build, "_load", lambda code: code)
    assert backends.warmup(said.append)
    assert made == list(build.ENTRIES)
    assert len(list((fresh / "kernels").glob("*.kernel"))) == len(made)
    assert [line.split(":")[0] for line in said] == made
    forget()
    made.clear()
    assert backends.warmup(said.append)
    assert not made
    monkeypatch.setattr(build, "_load", no_compiler)
    forget()
    assert not backends.warmup(said.append)


@pytest.fixture
def device_one(tmp_path, monkeypatch):
    """A CUDA device that is not there: what stands around the check, which is the same function that `doctor --kernels` runs."""
    from stillhouse.kernels import cuda

    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "identity", lambda device: f"device-{device}")
    monkeypatch.setattr(backends, "cuda_available", lambda: (True, "a device"))
    backends.cuda_failure.cache_clear()
    yield SimpleNamespace(device=SimpleNamespace(type="cuda", index=1), dtype=torch.float32)
    backends.cuda_failure.cache_clear()


@pytest.mark.parametrize("passes", [True, False])
def test_the_cuda_kernel_is_used_after_its_check_alone(passes, device_one, monkeypatch):
    asked = []

    def check(device, backend):
        asked.append((device, backend))
        return [("dense forward", True, ""), ("top-k", passes, "relative error 1")]

    monkeypatch.setattr(selfcheck, "check", check)
    assert backends.explain("cuda:1") == (
        "cuda",
        "CUDA tensors: a device; not checked yet, which the first call does",
    )
    for _ in range(2):  # the second as in another process
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            chosen = [backends.choose(device_one, None) for _ in range(3)]
        assert chosen == ["cuda" if passes else "torch"] * 3
        assert len(said) == (0 if passes else 1)
        assert all(
            "relative error 1" in str(w.message) and str(cache.folder()) in str(w.message) for w in said
        )
        backends.cuda_failure.cache_clear()
    assert asked == [("cuda:1", "cuda")]
    in_use, why = backends.explain("cuda:1")
    assert in_use == ("cuda" if passes else "torch")
    assert "not checked" not in why
    assert passes or "top-k: relative error 1" in why


@pytest.mark.parametrize("raises", [True, False])
def test_what_a_check_could_not_compute_is_no_verdict_for_other_processes(raises, device_one, monkeypatch):
    def check(device, backend):
        if raises:
            raise RuntimeError("out of memory")
        return [("dense forward", False, "RuntimeError: out of memory")]

    monkeypatch.setattr(selfcheck, "check", check)
    with pytest.warns(RuntimeWarning, match=r"out of memory'.*then start again"):
        assert backends.choose(device_one, None) == "torch"
    assert backends.choose(device_one, None) == "torch"
    assert backends.explain("cuda:1", certain=True)[0] == "torch"
    backends.cuda_failure.cache_clear()  # as in another process
    monkeypatch.setattr(selfcheck, "check", lambda device, backend: [("dense forward", True, "")])
    assert backends.choose(device_one, None) == "cuda"


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_the_check_is_the_same_whatever_the_caller_is_in(within):
    expected = selfcheck.check("cpu", "torch")
    with within():
        assert selfcheck.check("cpu", "torch") == expected
    assert all(passed for _, passed, _ in expected)


def test_the_check_of_a_cuda_device_is_of_its_kernel(monkeypatch):
    """By default one that was found to be wrong would have torch checked, which passes."""
    asked = []

    def record(*given):
        asked.append(given[-1])
        return "", True, ""

    monkeypatch.setattr(backends, "cuda_available", lambda: (True, "a device"))
    monkeypatch.setattr(selfcheck, "_check", record)
    selfcheck.check("cuda:0")
    assert set(asked) == {"cuda"}


def test_without_an_entry_point_for_threads_one_is_what_there_is(monkeypatch):
    monkeypatch.setattr(workers, "openmp", lambda: None)
    monkeypatch.setattr(backends, "cpu_failure", lambda kernel: None)
    assert "one thread, since" in backends.explain("cpu")[1]


def test_a_restricted_student_asks_for_the_kernel_that_it_runs(fresh, monkeypatch):
    """Its k logits are dense ones: without that kernel torch computes, and the sparse one does not matter."""
    student, target = logits(64, 200, 1), TopK.from_logits(logits(64, 200, 2), 8, rest="renormalise")
    expected = softmax_kl(student, target, divergence="reverse", backend="torch")
    asked = []
    monkeypatch.setattr(backends, "cpu_failure", lambda kernel: asked.append(kernel) or "gone")
    with pytest.warns(RuntimeWarning, match="torch computes in their place"):
        assert torch.equal(softmax_kl(student, target, divergence="reverse"), expected)
    assert asked == ["dense"]
    monkeypatch.undo()
