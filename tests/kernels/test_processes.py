"""Threads, forks, processes and memory."""

import ctypes
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import DIVERGENCES, logits
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from stillhouse.kernels import TopK, softmax_kl
from stillhouse.kernels.cpu import workers

ROWS, WIDTH = 64, 3000  # enough for several threads


def loss_and_gradient(seed=1, divergence="forward", target=None):
    student = logits(ROWS, WIDTH, seed).requires_grad_()
    loss = softmax_kl(student, logits(ROWS, WIDTH, 2) if target is None else target, divergence=divergence)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("target", ["dense", "top-k"])
def test_runs_are_equal_bit_for_bit_with_any_number_of_threads(divergence, target):
    against = TopK.from_logits(logits(ROWS, WIDTH, 2), 16) if target == "top-k" else None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(divergence=divergence, target=against))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.fixture
def many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def compiled(body):
    """What stands for compiled rows: ``body`` is called with a call's address, by each thread that takes part."""
    native = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)
    address = ctypes.cast(native, ctypes.c_void_p).value

    class Rows:
        def __init__(self):
            self.address = address

        def __call__(self, call):
            native(call)

    return Rows()


def test_the_number_of_threads_is_torchs(many_threads, monkeypatch):
    if workers.openmp() is None:
        pytest.skip("this torch has no OpenMP with GNU's entry point")
    seen, barrier = set(), threading.Barrier(many_threads, timeout=20)

    def body(_call):
        barrier.wait()  # only three threads at once get past
        seen.add(threading.get_native_id())

    def alone(_call):
        seen.add(threading.get_native_id())

    workers.Workers().run(compiled(body), 100, 1_000_000, 10, (), ())
    assert len(seen) == many_threads
    for without in ("threads", "openmp"):
        seen.clear()
        if without == "threads":
            torch.set_num_threads(1)
        else:
            torch.set_num_threads(many_threads)
            monkeypatch.setattr(workers, "openmp", lambda: None)
        workers.Workers().run(compiled(alone), 100, 1_000_000, 10, (), ())
        assert seen == {threading.get_native_id()}


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("rows", [1, 2, 7, 4097, 1_000_003])
def test_every_row_is_in_one_share(rows, threads):
    from stillhouse.kernels.cpu.calls import beginning

    begins = [beginning(share, rows, min(threads, rows)) for share in range(2000)]
    assert begins[0] == 0
    assert begins == sorted(begins)
    assert begins[-1] == rows


def test_the_threads_are_those_that_torch_is_linked_to():
    """A second OpenMP runtime would have threads of its own, which fight torch's for the cores."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    program = """
import os, torch
from stillhouse.kernels import softmax_kl
from stillhouse.kernels.cpu import workers
torch.set_num_threads(3)
torch.randn(2000, 2000).log_softmax(-1)
before = len(os.listdir("/proc/self/task"))
softmax_kl(torch.randn(64, 3000), torch.randn(64, 3000))
print(workers.openmp() is None or len(os.listdir("/proc/self/task")) == before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "True", done.stderr


def test_several_python_threads_at_once():
    expected = [loss_and_gradient(seed) for seed in range(4)]
    failures = []

    def work(seed):
        for _ in range(10):
            loss, gradient = loss_and_gradient(seed)
            if not (torch.equal(loss, expected[seed][0]) and torch.equal(gradient, expected[seed][1])):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


STUDENT, TEACHER = logits(ROWS, WIDTH, 5), logits(ROWS, WIDTH, 6)


def in_child(queue):
    torch.set_num_threads(2)  # torch's own threads did not come along, and waiting for them never ends
    queue.put(softmax_kl(STUDENT.detach().requires_grad_(), TEACHER).item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork():
    expected = softmax_kl(
        STUDENT.detach().requires_grad_(), TEACHER
    ).item()  # the parent's threads are running
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(20)
    assert child.exitcode == 0


FORKED = """
import os, sys
import numpy, torch
from stillhouse.kernels import TopK, softmax_kl
from stillhouse.kernels.cpu import workers
torch.set_num_threads(2)
def tensor(rows, width):  # by numpy: no operator of torch's has started its threads
    return torch.from_numpy(numpy.random.default_rng(0).standard_normal((rows, width), dtype="float32"))
softmax_kl(tensor(256, 4000), tensor(256, 4000))
child = os.fork()
if child == 0:
    torch.ones(2000, 2000).exp()
    softmax_kl(tensor(70000, 4), tensor(70000, 4))
    indices = torch.from_numpy(numpy.arange(64)[None].repeat(1024, 0))
    softmax_kl(tensor(1024, 64), TopK(indices, torch.full((1024, 64), 1 / 64).log()))
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_after_nothing_but_the_kernel_may_use_torch():
    """Torch's operators in the child would wait for threads that the kernel started in the parent."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class Losses(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return softmax_kl(logits(8, 100, index), logits(8, 100, 9))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_in_forked_loader_workers():
    loss_and_gradient()
    loader = DataLoader(Losses(), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), torch.stack([Losses()[i] for i in range(4)]))


PROGRAM = """
import sys, time
import stillhouse
assert "torch" not in sys.modules, "importing stillhouse imports torch"
import torch
import stillhouse.kernels
assert "numba" not in sys.modules, "importing stillhouse.kernels imports numba"
student, teacher = torch.zeros(100, 100, requires_grad=True), torch.ones(100, 100)
start = time.perf_counter()
stillhouse.kernels.softmax_kl(student, teacher, backend=sys.argv[1] if sys.argv[1:] else None).backward()
first = time.perf_counter() - start
print(first, "compiled" if "numba" in sys.modules else "loaded")
"""


def run_program(cache):
    environment = {**os.environ, "STILLHOUSE_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_kernels(tmp_path):
    assert run_program(tmp_path)[1] == "compiled"
    assert run_program(tmp_path)[1] == "loaded"
    (kept,) = tmp_path.glob("kernels/*.kernel")
    content = kept.read_bytes()
    for damaged in (content[:-100], content[:-1] + b"?", b"", b"nonsense"):
        kept.write_bytes(damaged)
        assert run_program(tmp_path)[1] == "compiled"
        assert run_program(tmp_path)[1] == "loaded"


def test_imports_are_late_and_the_first_call_of_a_process_works():
    environment = dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_the_cache_knows_every_source(monkeypatch, tmp_path):
    from stillhouse.kernels.cpu import build

    before = build.fingerprint()
    copies = []
    (tmp_path / "cpu").mkdir()
    for path in build.sources():
        copies.append(tmp_path / path.relative_to(Path(build.__file__).parents[1]))
        copies[-1].write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "__file__", str(tmp_path / "cpu" / "build.py"))
    assert build.fingerprint() == before
    assert len(copies) > 10
    for source in copies:
        text = source.read_bytes()
        source.write_bytes(text + b"#")
        assert build.fingerprint() != before, source
        source.write_bytes(text)


@pytest.mark.slow
def test_without_a_place_for_the_cache_it_compiles_in_memory(tmp_path):
    (tmp_path / "file").touch()
    assert run_program(tmp_path / "file" / "folder")[1] == "compiled"


def test_another_compiler_or_processor_has_another_key(monkeypatch):
    from stillhouse.kernels.cpu import build

    keys = {build.key()}
    monkeypatch.setattr(build.llvm, "get_host_cpu_name", lambda: "another")
    keys.add(build.key())
    monkeypatch.setattr(build.llvmlite, "__version__", "another")
    keys.add(build.key())
    assert len(keys) == 3


def test_numbas_settings_have_another_key(monkeypatch, tmp_path):
    from stillhouse.kernels.cpu import build

    monkeypatch.chdir(tmp_path)
    keys = {build.key()}
    for name, value in (("OPT", "0"), ("OPT", "1"), ("SLP_VECTORIZE", "1"), ("CPU_NAME", "haswell")):
        monkeypatch.setenv(f"NUMBA_{name}", value)
        keys.add(build.key())
    for text in ("cpu_name: haswell", "cpu_name: generic"):
        (tmp_path / ".numba_config.yaml").write_text(text)
        keys.add(build.key())
    assert len(keys) == 7
    before = build.key()
    for name in ("CACHE_DIR", "NUM_THREADS", "DISABLE_JIT"):
        monkeypatch.setenv(f"NUMBA_{name}", "1")
    assert build.key() == before, "these change no code"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a processor of another kind")
def test_code_for_a_lesser_processor_than_this_one(tmp_path):
    """Numba's variables choose it, as for a cache that several machines share."""
    chosen = {
        "STILLHOUSE_CACHE": str(tmp_path),
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
    }
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from cases import exact, fused, logits, relative
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    student, teacher = logits(16, 1000, 1, dtype=dtype), logits(16, 1000, 2, dtype=dtype)
    rows, gradient = fused(student, teacher)
    rows_exact, gradient_exact = exact(student, teacher)
    assert relative(rows, rows_exact) <= 1e-6
    assert relative(gradient, gradient_exact) <= (1e-6 if dtype == torch.float32 else 1e-2)

# what was compiled into the kernel, and what Numba compiled of its own for it, is there for Python as before
import math
import numba
from stillhouse.kernels.cpu.calls import beginning
assert beginning(1, 100, 2) == 25
own = numba.njit(lambda x: max(min(x, 5.0), abs(-3)) + math.log(x) + sum([i for i in range(4)]))
assert own(4.0) == 10.0 + math.log(4.0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a processor of another kind")
def test_a_processor_that_lacks_an_instruction_is_refused_and_nothing_is_kept(tmp_path):
    chosen = {"STILLHOUSE_CACHE": str(tmp_path), "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "numba"],
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "got a processor without float16 conversions (generic)" in done.stderr
    assert not list(tmp_path.glob("kernels/*.kernel"))


def test_without_numbas_compiler_and_without_a_kernel_there_is_a_way_out(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "numba"],
        env={**os.environ, "STILLHOUSE_CACHE": str(tmp_path), "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "got NUMBA_DISABLE_JIT" in done.stderr
    assert "backend='torch'" in done.stderr


def allocated(step):
    """The largest sum of tensor memory held at a time during ``step``, in bytes."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_of_the_logits_size_is_allocated_but_the_gradient(divergence):
    student, teacher = logits(512, 2000, 1), logits(512, 2000, 2)
    size = student.numel() * 4

    def fresh():
        softmax_kl(student.detach().requires_grad_(), teacher, divergence=divergence).backward()

    def in_place():
        leaf = student.detach().requires_grad_()
        softmax_kl(leaf.clone(), teacher, divergence=divergence, inplace=True).backward()

    def copying():
        student.clone()

    assert size <= allocated(fresh) <= 1.02 * size
    assert allocated(in_place) - allocated(copying) <= 0.02 * size
