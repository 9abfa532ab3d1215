"""What is made once and kept on disk by what it was made from: trained teachers, generated data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stillhouse.files import write_bytes

CACHE = "STILLHOUSE_CACHE"
_KEY = "made_from"


def cache_dir() -> Path:
    """The folder: ``$STILLHOUSE_CACHE``, else the user's cache folder."""
    return Path(os.environ.get(CACHE) or user_cache_dir("stillhouse"))


def made_once(
    kind: str, made_from: Mapping[str, object], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The CPU tensors that ``make`` gives, by name; kept on disk, and read from there the next time.

    kind
        Names the folder, such as ``data``.
    made_from
        All that the tensors depend on, as JSON values: settings, seeds, versions of the libraries that make them.
        Where any of it changes, they are made anew.

    A file that is damaged is made anew, and a folder that can't be written to costs only the time.
    """
    key = json.dumps(dict(made_from), sort_keys=True)
    path = cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    found = _read(path, key)
    if found is not None:
        return found
    made = make()
    with contextlib.suppress(OSError):  # a full disk, or a folder of someone else's
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in made.items()}, {_KEY: key}))
    return made


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(_KEY) != key:
                return None
            # copies: memory of their own is aligned as fresh tensors are, which the last bit of a product may show
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 no mapping
    except (OSError, SafetensorError):
        return None
