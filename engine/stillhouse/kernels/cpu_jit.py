"""Compilation with a cache on disk that knows every source file it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

SOURCES = ("cpu_math.py", "cpu_read.py", "cpu_rows.py", "cpu_dense.py", "cpu_sparse.py")


def compiled(signature: str, factory: Callable[[str], Callable[..., Any]]) -> Callable[..., Any]:
    """Compile ``factory(fingerprint)`` for one signature; the result releases the interpreter lock while it runs.

    Numba's cache sees a change of the entry point's own file only. The fingerprint of all sources, closed over by
    the function, is part of the cache's key and covers the helpers.

    Numba looks for a cache beside the source, then in the user's cache directory (``NUMBA_CACHE_DIR`` goes before
    both) and refuses to go on without one: then each process compiles for itself.
    """
    function = factory(fingerprint())
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(signature, cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "locator" not in str(error):
            raise
        return njit(signature, **options)(function)  # type: ignore[no-any-return]


def fingerprint() -> str:
    """A digest of the sources of the CPU kernels."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
