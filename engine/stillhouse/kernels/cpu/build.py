"""Compiled rows without Numba at hand: its object code is kept on disk, and llvmlite alone loads it.

Importing Numba costs a new process 0.2 s (and what a cached function of its own asks for more); the first call with an object
file that llvmlite loads takes 0.04 to 0.06 s (docs/kernels.md). Numba is imported where nothing is found.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import logging
import os
import struct
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from stillhouse.kernels import cache

BLOCK = 2048  # columns at a time, which are redone where a reference has to rise
# functions of a call's address, and their modules; those with a label term are compiled where one is asked for
ENTRIES = {"dense": "dense", "dense_labels": "dense", "sparse": "sparse", "sparse_labels": "sparse"}
# that this takes on two cores of 2024, one of them busy
SECONDS = {"dense": 25, "dense_labels": 30, "sparse": 25, "sparse_labels": 30}
# of Numba's variables, those without a bearing on machine code
NO_BEARING = {"NUMBA_CACHE_DIR", "NUMBA_DISABLE_JIT", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER"}
_LOCK = threading.Lock()
_LOG = logging.getLogger("stillhouse.kernels")
SYMBOL = "stillhouse_rows"
WRAPPERS = ("create_cpython_wrapper", "create_cfunc_wrapper")  # of Numba's target
# what every call begins with: the next share of the rows, the next part of the scratch, how many rows are done, the sums
# of both terms' losses (float64), rows, threads, scratch, size. Then come the call's integers, addresses too, and its floats
NEXT, PART, DONE, TOTAL, _, ROWS, THREADS, SCRATCH, SIZE = range(9)
HEADER, INTEGERS, REALS = 9, 19, 7
FLOATS = HEADER + INTEGERS
_LAYOUT = struct.Struct(f"={FLOATS}q{REALS}d")
_MEMORY = ctypes.c_char * _LAYOUT.size
_TOTALS = struct.Struct("=2d")


class Compiled:
    """A compiled function over the rows of a call; any number of threads may run it on one call at once."""

    def __init__(self, engine: llvm.ExecutionEngine) -> None:
        self._engine = engine  # the code lives as long as it does
        self.address: int = engine.get_function_address(SYMBOL)
        self._native = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def __call__(self, call: ctypes.Array[ctypes.c_char]) -> None:
        """Take rows until none is left, without the interpreter lock."""
        self._native(call)


def record(
    rows: int, threads: int, scratch: int, size: int, integers: tuple[int, ...], floats: tuple[float, ...]
) -> ctypes.Array[ctypes.c_char]:
    """A call in memory; what is left out of the integers and floats is 0."""
    integers += (0,) * (INTEGERS - len(integers))
    floats += (0.0,) * (REALS - len(floats))
    packed = _LAYOUT.pack(0, 0, 0, 0, 0, rows, threads, scratch, size, *integers, *floats)
    return _MEMORY.from_buffer_copy(packed)


def totals_of(call: ctypes.Array[ctypes.c_char]) -> tuple[float, float]:
    """The sums of both terms' losses, once all rows are done."""
    totals: tuple[float, float] = _TOTALS.unpack_from(call, 8 * TOTAL)
    return totals


@lru_cache(maxsize=len(ENTRIES))
def entry(name: str) -> Compiled:
    """The compiled function ``name``, from the cache or fresh."""
    with _LOCK:  # threads that come meanwhile wait for the one that compiles
        return _made(name)


@lru_cache(maxsize=len(ENTRIES))
def _made(name: str) -> Compiled:
    file = _file(name)  # of the sources as they are before it is compiled
    code = cache.read(file)
    if code is None:
        code = _compile(name)
        cache.write(file, code)
    return _load(code)


def kept(name: str) -> bool:
    """Is the function on disk?"""
    return cache.read(_file(name)) is not None


def _file(name: str) -> str:
    return f"cpu-{name}-{key()}.kernel"


def key() -> str:
    """Changes with the sources, the compiler and what it is told, and the processor."""
    settings = Path(".numba_config.yaml")  # which Numba looks for where it is imported
    what = (
        fingerprint(),
        importlib.metadata.version("numba"),
        llvmlite.__version__,
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_") and k not in NO_BEARING),
        settings.read_bytes() if settings.is_file() else b"",
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:24]


def fingerprint() -> str:
    """A digest of the sources of the CPU kernels."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sources() -> list[Path]:
    """All that compiled code depends on."""
    here = Path(__file__).parent
    return [here.with_name("series.py"), *sorted(here.glob("*.py"))]


def _compile(name: str) -> bytes:
    """Object code of a function of a call's address, as ``SYMBOL``; it needs nothing of Numba when it runs."""
    module, machine = optimised(name)
    code: bytes = machine.emit_object(module)
    return code


def optimised(name: str) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """The LLVM module of such a function, and the machine that it is to be compiled for."""
    from numba import config, njit, types
    from numba.core import compiler
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        raise RuntimeError(
            "stillhouse's CPU kernel: got NUMBA_DISABLE_JIT, and no kernel that was compiled before; expected to compile it. Fix: "
            "unset the variable, or pass backend='torch'."
        )
    function = getattr(importlib.import_module(f"{__package__}.{ENTRIES[name]}"), name)
    dispatcher: Any = njit(error_model="numpy")(function)
    flags: Any = compiler.Flags()  # type: ignore[no-untyped-call]
    dispatcher.targetdescr.options.parse_as_flags(flags, dispatcher.targetoptions)
    flags.no_compile = True
    typing, target = cpu_target.typing_context, cpu_target.target_context
    with global_compiler_lock:
        typing.refresh()
        target.refresh()
        usual, ours = target._internal_codegen, _codegen()
        try:
            target._internal_codegen = ours
            # what would make the functions callable from Python takes a third of the time
            vars(target).update(dict.fromkeys(WRAPPERS, lambda *_, **__: None))
            _refuse_a_processor_without_float16(target._internal_codegen._tm)
            said = "stillhouse compiles its CPU kernel '%s', once: about %d seconds (`stillhouse warmup` does it ahead)"
            _LOG.warning(said, name, SECONDS[name])
            result: Any = compiler.compile_extra(  # type: ignore[no-untyped-call]
                typing, target, function, (types.int64,), types.void, flags, {}
            )
            plain = target.codegen().create_library(SYMBOL)  # type: ignore[no-untyped-call]
            plain.add_ir_module(_plain(result.fndesc.llvm_func_name))
            plain.add_linking_library(result.library)
            plain.finalize()
        finally:
            target._internal_codegen = usual
            for wrapper in WRAPPERS:
                vars(target).pop(wrapper, None)
            _forget()
    return plain._final_module, plain._codegen._tm


def _codegen() -> Any:
    """Numba's, but that what it compiles is only linked: optimised once, all together, and never made callable.

    A function of Numba's is optimised and made machine code by itself, with all that it calls, and then again within each that
    calls it: half of the time for code that is as fast.
    """
    from numba.core import codegen

    class Library(codegen.JITCodeLibrary):  # type: ignore[misc]
        def _optimize_final_module(self) -> None:
            if self.name == SYMBOL:
                super()._optimize_final_module()  # type: ignore[no-untyped-call]

        def _finalize_specific(self) -> None:
            pass

        def get_pointer_to_function(self, name: str) -> int:
            return 0  # what Python would call, if it did: _forget sees to it that it does not

    class Codegen(codegen.JITCPUCodegen):  # type: ignore[misc]
        _library_class = Library

        def _customize_tm_features(self) -> str:
            return ",".join([super()._customize_tm_features(), *tuning()])  # type: ignore[no-untyped-call]

        def _customize_tm_options(self, options: dict[str, Any]) -> None:
            super()._customize_tm_options(options)  # type: ignore[no-untyped-call]
            # constants beside the code, which an instruction can then read; from anywhere they take two to fetch
            options |= {"reloc": "pic", "codemodel": "small"}

        def _add_module(self, module: Any) -> None:
            pass

        def set_env(self, env_name: str, env: Any) -> None:
            pass

    return Codegen("stillhouse")  # type: ignore[no-untyped-call]


def _forget() -> None:
    """Let Numba compile the kernels' functions anew: what it holds for them has no machine code that Python could call.

    What it compiled of its own for them stays. Python cannot call that in any case, and other functions link it as it is.
    """
    from numba.core.dispatcher import Dispatcher

    modules = [module for name, module in sys.modules.items() if name.startswith(__package__)]
    held: set[Any] = {x for module in modules for x in vars(module).values() if isinstance(x, Dispatcher)}
    for dispatcher in held:
        dispatcher._make_finalizer()()
        dispatcher._reset_overloads()


def _refuse_a_processor_without_float16(machine: llvm.TargetMachine) -> None:
    """LLVM calls a function for a conversion that it has no instruction for, and ends the process where there is none."""
    conversion = "define float @f(half %x) {\n %y = fpext half %x to float\n ret float %y\n}"
    if b"__extendhfsf2" in machine.emit_object(llvm.parse_assembly(conversion)):
        raise RuntimeError(
            f"stillhouse's CPU kernel: got a processor without float16 conversions ({processor()}); expected F16C, as in"
            " x86-64-v3. Fix: set NUMBA_CPU_NAME and NUMBA_CPU_FEATURES to such a one, or pass backend='torch'."
        )


def _plain(symbol: str) -> Any:
    """An LLVM module with ``SYMBOL``, a function of one pointer and no result, around one in Numba's convention."""
    from llvmlite import ir

    word, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
    module = ir.Module(SYMBOL)
    # where to put the result, where to put an exception, the arguments; a status comes back
    numbas = ir.FunctionType(ir.IntType(32), [pointer.as_pointer(), pointer.as_pointer(), word])
    inner = ir.Function(module, numbas, symbol)
    outer = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), SYMBOL)
    builder = ir.IRBuilder(outer.append_basic_block())
    result, raised = builder.alloca(pointer), builder.alloca(pointer)
    builder.call(inner, [result, raised, builder.ptrtoint(outer.args[0], word)])
    builder.ret_void()
    return module


def processor() -> str:
    """LLVM's name of the processor that is compiled for, which Numba's variable may put in the place of this one."""
    return os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()  # type: ignore[no-any-return, no-untyped-call]


def tuning() -> list[str]:
    """What is told to LLVM besides the processor's features.

    It keeps to 256-bit vectors where wider ones once slowed the clock. From Ice Lake on (avx512vbmi2) they do not, and
    rows of a thousand logits take a fifth to a quarter less time with 512.
    """
    from stillhouse.kernels.cpu.lanes import features

    return ["-prefer-256-bit"] if "+avx512vbmi2" in features() else []


def _load(code: bytes) -> Compiled:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Compiled(engine)
