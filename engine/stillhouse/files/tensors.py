"""Tensors by name in a safetensors file, whole and as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stillhouse.errors import DamagedFile
from stillhouse.files.reading import read_bytes
from stillhouse.files.seals import BLANK, check_seal, seal
from stillhouse.files.writing import write_bytes

_SEAL = "seal"


def tensor_bytes(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of the tensors, on the CPU. Tensors that share memory (tied weights) are written each.

    about
        Metadata; with it the file is sealed: it holds a digest of itself.
    """
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        given = tensor.detach().cpu().contiguous()
        # safetensors refuses names that share memory; each gets its own, so that a reader finds every name.
        shared = given.numel() > 0 and given.untyped_storage().data_ptr() in seen
        own[name] = given.clone() if shared else given
        seen.add(own[name].untyped_storage().data_ptr())
    if about is None:
        return bytes(save(own))
    return seal(bytes(save(own, {**about, _SEAL: BLANK})))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a sealed safetensors file with metadata, atomically; WriteFailed where it can't be."""
    write_bytes(path, tensor_bytes(tensors, about))


def read_tensors(
    path: Path, *, what: str = "", mend: str = "", sealed: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The CPU tensors and the metadata of a safetensors file.

    sealed
        The file was written with ``about``: its digest is checked.

    Raises DamagedFile for a file that is no safetensors, or was changed since it was sealed.
    """
    content = read_bytes(path, what=what, mend=mend)
    problem = check_seal(content) if sealed else ""
    if not problem:
        try:
            about = _metadata(content)
            # copies: memory of their own is aligned as fresh tensors are, which the last bit of a product may show
            return {name: tensor.clone() for name, tensor in load(content).items()}, about
        except (SafetensorError, ValueError, KeyError, RecursionError) as error:
            problem = f"{error}: it is no safetensors file"
    named = f"{what} {path}" if what else str(path)
    raise DamagedFile(f"{named} can't be read: {problem}{f'; {mend}' if mend else ''}")


def _metadata(content: bytes) -> dict[str, str]:
    import json

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: str(value) for name, value in header.get("__metadata__", {}).items() if name != _SEAL}
