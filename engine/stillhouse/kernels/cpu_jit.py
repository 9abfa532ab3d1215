"""Compiled rows without Numba at hand: its object code is kept on disk, and llvmlite alone loads it.

Importing Numba costs a new process half a second and more (and what a cached function of its own asks for as much
again); loading an object file with llvmlite costs a tenth of that. Numba is imported where nothing is found.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

BLOCK = 2048  # columns at a time: buffers of 8 KB stay in the first-level cache
SOURCES = ("cpu_jit.py", "cpu_math.py", "cpu_read.py", "cpu_rows.py", "cpu_dense.py", "cpu_sparse.py")
ENTRIES = {  # module, and arguments: q an int64, which may be an address, d a float64
    "dense_rows": ("cpu_dense", "q" * 19 + "d" * 4),
    "sparse_rows": ("cpu_sparse", "q" * 17 + "d" * 4),
}


@lru_cache(maxsize=len(ENTRIES))
def entry(name: str) -> Callable[..., None]:
    """The compiled function ``name``, from the cache or fresh; it runs without the interpreter lock."""
    kept = f"stillhouse-{name}-{key()}.kernel"
    for folder in folders():
        found = _read(folder / kept)
        if found is not None:
            return _load(*found, ENTRIES[name][1])
    symbol, code = _compile(name)
    content = (
        hashlib.sha256(symbol.encode() + code).hexdigest().encode() + b" " + symbol.encode() + b"\n" + code
    )
    any(_write_whole(folder / kept, content) for folder in folders())
    return _load(symbol, code, ENTRIES[name][1])


def key() -> str:
    """Changes with the sources, the compiler and the processor."""
    what = (
        fingerprint(),
        importlib.metadata.version("numba"),
        llvmlite.__version__,
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        os.environ.get("NUMBA_CPU_NAME"),
        os.environ.get("NUMBA_CPU_FEATURES"),
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:24]


def fingerprint() -> str:
    """A digest of the sources of the CPU kernels."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def folders() -> Iterator[Path]:
    """Where compiled code is looked for, and kept in the first that can be written."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(chosen)
        return
    yield Path(__file__).with_name("__pycache__")
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse" / "cpu"


def _read(path: Path) -> tuple[str, bytes] | None:
    """Symbol and object code; None where there is none, or it is damaged: LLVM ends the process over such a one."""
    try:
        head, code = path.read_bytes().split(b"\n", 1)
        digest, symbol = head.split(b" ")
    except (OSError, ValueError):
        return None
    return (symbol.decode(), code) if hashlib.sha256(symbol + code).hexdigest().encode() == digest else None


def _write_whole(path: Path, content: bytes) -> bool:
    """Under another name first: a process that looks meanwhile finds all of it or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except OSError:
        return False
    return True


def _compile(name: str) -> tuple[str, bytes]:
    """Symbol and object code of a function that takes plain numbers; it needs nothing of Numba when it runs."""
    from numba import njit, types
    from numba.core import codegen, compiler
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    module, arguments = ENTRIES[name]
    function = getattr(importlib.import_module(f"stillhouse.kernels.{module}"), name)
    dispatcher: Any = njit(error_model="numpy")(function)
    flags: Any = compiler.Flags()  # type: ignore[no-untyped-call]
    dispatcher.targetdescr.options.parse_as_flags(flags, dispatcher.targetoptions)
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = (
        True  # wrappers are what would need it
    )
    typing, target = cpu_target.typing_context, cpu_target.target_context
    kinds = tuple({"q": types.int64, "d": types.float64}[kind] for kind in arguments)

    class Codegen(codegen.JITCPUCodegen):  # type: ignore[misc]
        def _customize_tm_features(self) -> str:
            return ",".join([super()._customize_tm_features(), *tuning()])  # type: ignore[no-untyped-call]

    with global_compiler_lock:
        typing.refresh()
        target.refresh()
        usual = target._internal_codegen
        target._internal_codegen = Codegen("stillhouse")  # type: ignore[no-untyped-call]
        try:
            result: Any = compiler.compile_extra(  # type: ignore[no-untyped-call]
                typing, target, function, kinds, types.void, flags, {}
            )
            result.library.finalize()
        finally:
            target._internal_codegen = usual
        code = result.library._codegen._tm.emit_object(result.library._final_module)
    return result.fndesc.llvm_func_name, code


def tuning() -> list[str]:
    """What is told to LLVM besides the processor's features.

    It keeps to 256-bit vectors where wider ones once slowed the clock. From Ice Lake on (avx512vbmi2) they do not, and
    rows of a thousand logits take a fifth to a quarter less time with 512.
    """
    return ["-prefer-256-bit"] if llvm.get_host_cpu_features().get("avx512vbmi2") else []


def _load(symbol: str, code: bytes, arguments: str) -> Callable[..., None]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    kinds: list[Any] = [{"q": ctypes.c_int64, "d": ctypes.c_double}[kind] for kind in arguments]
    # Numba's convention: where to put the result, where to put an exception, the arguments; a status comes back
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *kinds)
    native = prototype(engine.get_function_address(symbol))

    def call(*numbers: Any, keep: llvm.ExecutionEngine = engine) -> None:
        result, raised = ctypes.c_void_p(), ctypes.c_void_p()
        status = native(ctypes.byref(result), ctypes.byref(raised), *numbers)
        assert status == 0, f"{symbol} ended with status {status}"

    return call
