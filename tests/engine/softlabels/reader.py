"""A reader of kept labels written from docs/soft-labels.md alone: no torch, no safetensors, nothing of Stillhouse."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1", "U16": "<u2"}
SEAL = b"stillhouse-sha256:"


def sealed_json(path: Path) -> dict:
    """A JSON file whose seal is the digest of the file with zeros in its place."""
    content = path.read_bytes()
    found = json.loads(content)
    digits = found["seal"].encode().removeprefix(SEAL)
    assert len(digits) == 64
    assert hashlib.sha256(content.replace(digits, b"0" * 64)).hexdigest().encode() == digits
    return found


def tensors(path: Path, sha256: str) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256
    (size,) = struct.unpack("<Q", content[:8])
    found = {}
    for name, about in json.loads(content[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        start, end = about["data_offsets"]
        raw = np.frombuffer(content[8 + size + start : 8 + size + end], TYPES[about["dtype"]])
        if about["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype("<u4") << 16).view("<f4")
        found[name] = raw.reshape(about["shape"])
    return found


def log_probabilities(stored: np.ndarray) -> np.ndarray:
    if stored.dtype != np.uint8:
        return stored.astype(np.float64)
    byte = stored.astype(np.float64)
    return np.where(stored == 255, -np.inf, -24 * (byte / 254) ** 2)


def numbers(stored: np.ndarray) -> np.ndarray:
    wide = stored.astype(np.int64)
    return wide[..., 0] + (wide[..., 1] << 8) + (wide[..., 2] << 16)


class Store:
    """``probabilities(sample)``: float64 (rows, V), and the mass of all classes that are not among the kept (rows)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = sealed_json(folder / "store.json")
        assert self.about["version"] == 1
        self.manifests = [sealed_json(path) for path in sorted(folder.glob("shard-*.json"))]
        self.head = None
        if self.about["head"]:
            self.head = tensors(folder / "head.safetensors", self.about["head"])

    def _find(self, sample: int) -> tuple[dict, dict, int]:
        for manifest in self.manifests:
            ids = manifest["ids"]
            if not ids["first"] <= sample <= ids["last"]:
                continue
            found = tensors(self.folder / manifest["file"], manifest["sha256"])
            if ids["contiguous"]:
                return manifest, found, sample - ids["first"]
            there = np.flatnonzero(found["ids"] == sample)
            if len(there):
                return manifest, found, int(there[0])
        raise KeyError(sample)

    def _rows(self, manifest: dict, found: dict, at: int) -> tuple[int, int]:
        if manifest["row_shape"] is not None:
            each = int(np.prod(manifest["row_shape"], dtype=np.int64))
            return at * each, (at + 1) * each
        return int(found["rows"][at]), int(found["rows"][at + 1])

    def feature(self, sample: int, name: str) -> np.ndarray:
        manifest, found, at = self._find(sample)
        if name in manifest["features"]["per_sample"]:
            return found[f"feature.{name}"][at]
        return found[f"feature.{name}"][slice(*self._rows(manifest, found, at))]

    def probabilities(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        manifest, found, at = self._find(sample)
        form = manifest["form"]
        first, stop = self._rows(manifest, found, at)
        kept = self._unpacked(form, found, at, stop - first) if form["packed"] else None
        if form["kind"] == "dense":
            logits = found["logits"][first:stop].astype(np.float64)
            if form["dtype"] == "float16":
                logits += found["shift"][first:stop, None]
            return softmax(logits), np.zeros(stop - first)
        if form["kind"] == "hidden":
            logits = found["hidden"][first:stop].astype(np.float64) @ self.head["weight"].astype(np.float64).T
            return softmax(logits + self.head.get("bias", 0)), np.zeros(stop - first)
        out = np.zeros((stop - first, form["outputs"]))
        if form["kind"] == "topk":
            part = kept or {name: found[name][first:stop] for name in ("indices", "log_probs", "log_rest")}
            each, rest = (np.exp(log_probabilities(part[name])) for name in ("log_probs", "log_rest"))
            total = each.sum(-1) + rest
            np.put_along_axis(out, numbers(part["indices"]), each / total[:, None], -1)
            return out, rest / total
        if kept is None:
            begin, end = found["entries"][at], found["entries"][at + 1]
            kept = {"indices": found["indices"][begin:end], "counts": found["counts"][begin:end]}
            kept["distinct"] = found["distinct"][first:stop]
        row = np.repeat(np.arange(stop - first), kept["distinct"])
        np.add.at(out, (row, numbers(kept["indices"])), kept["counts"] / form["k"])
        return out, np.zeros(stop - first)

    def _unpacked(self, form: dict, found: dict, at: int, rows: int) -> dict[str, np.ndarray]:
        import zstandard

        size = {"uint8": 1, "uint16": 2, "float16": 2, "float32": 4}[form["dtype"]]
        kind = {"uint8": "u1", "uint16": "<u2", "float16": "<f2", "float32": "<f4"}[form["dtype"]]
        if form["kind"] == "topk":
            parts = {
                "indices": (3, (rows, form["k"])),
                "log_probs": (size, (rows, form["k"])),
                "log_rest": (size, (rows,)),
            }
        else:
            entries = int(found["entries"][at + 1] - found["entries"][at])
            parts = {"indices": (3, (entries,)), "counts": (size, (entries,)), "distinct": (size, (rows,))}
        frame, out = at * sum(planes for planes, _ in parts.values()), {}
        for name, (planes, shape) in parts.items():
            bytes_of = []
            for number in range(frame, frame + planes):
                packed = found["packed"][found["blocks"][number] : found["blocks"][number + 1]].tobytes()
                bytes_of.append(zstandard.ZstdDecompressor().decompress(packed) if packed else b"")
            joined = np.stack([np.frombuffer(part, np.uint8) for part in bytes_of], -1).reshape(
                *shape, planes
            )
            frame += planes
            out[name] = joined if name == "indices" else np.ascontiguousarray(joined).view(kind)[..., 0]
            if name == "log_probs" and form["dtype"] == "uint8":
                out[name] = np.cumsum(out[name], -1, dtype=np.uint8)
        return out


def softmax(logits: np.ndarray) -> np.ndarray:
    found = np.exp(logits - logits.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True)
