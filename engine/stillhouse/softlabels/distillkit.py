"""Reading DistillKit's published layout: Parquet with a byte string a token, described by a compression config.

Columns: ``input_ids``, ``compressed_logprobs`` (a list of bytes a token) and ``bytepacked_indices``. The bytes of a token's k
log-probabilities, largest first: ``exact_k`` of them as they are, the coefficients of a curve for the others, and bins of
residuals, each a scale and whole numbers of so many bits (most significant bit first). With ``delta_encoding`` the numbers are
differences from the one before. The indices are whole numbers of ceil(log2 d) bits. A token's row says what comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from stillhouse.config import explain
from stillhouse.errors import ConfigError, DamagedFile
from stillhouse.kernels import TopK
from stillhouse.softlabels.exchange import parquet, store
from stillhouse.softlabels.fingerprint import PLAIN
from stillhouse.softlabels.forms import Form, encode
from stillhouse.softlabels.places import Place
from stillhouse.softlabels.shard import Rows
from stillhouse.softlabels.store import StoredLabels

CONFIG = "compression_config.yaml"
_COLUMNS = ("compressed_logprobs", "bytepacked_indices")
_Number = Literal["float16", "bfloat16", "float32", "float64"]


class Bin(BaseModel):
    """Residuals that share a scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scale_dtype: _Number
    element_bits: int = Field(gt=0, le=62)
    num_elements: int = Field(gt=0)


class Compression(BaseModel):
    """The published compression config."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    d: int = Field(gt=1)
    k: int = Field(gt=0)
    exact_k: int = Field(ge=0)
    exact_dtype: _Number = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: _Number = "float32"
    residual_bins: list[Bin] = Field(default_factory=list)
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False


def is_distillkit(source: Path) -> bool:
    """Whether this is a directory with a compression config and Parquet files."""
    return source.is_dir() and (source / CONFIG).is_file()


def read_distillkit(source: Path, where: Place, made_from: Mapping[str, str]) -> StoredLabels:
    """Import a directory. Samples are numbered in the order of the files' names and of the rows in them.

    A row of L tokens with L - 1 answers (the last says nothing more) has L - 1 rows, of the tokens 0 to L - 2.

    Raises ConfigError or DamagedFile where config and columns don't fit.
    """
    config = read_compression(source / CONFIG)
    files = sorted(source.glob("*.parquet"))
    if not files:
        raise ConfigError(f"{source} holds no Parquet file; expected some beside {CONFIG}")
    form = Form.choose(config.d, "topk", "float16", config.k)
    fingerprint = {**PLAIN, **made_from}
    return store(where, form, _samples(files, config, form), fingerprint, None)


def read_compression(path: Path) -> Compression:
    """The config beside the files; ConfigError naming the key that is wrong."""
    try:
        return Compression.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(explain(error, Compression, str(path))) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None


def _samples(files: list[Path], config: Compression, form: Form) -> Iterator[Rows]:
    pq, number = parquet(), 0
    for path in files:
        try:
            file = pq.ParquetFile(path)
            missing = set(_COLUMNS) - set(file.schema_arrow.names)
        except (OSError, ValueError) as error:
            raise DamagedFile(f"Parquet {path} can't be read: {error}") from None
        if missing:
            raise ConfigError(
                f"Parquet {path} has no column '{min(missing)}'; expected {', '.join(_COLUMNS)}"
            )
        for batch in file.iter_batches(256, columns=list(_COLUMNS)):
            columns = [batch.column(name) for name in _COLUMNS]
            for row in range(len(batch)):
                logs, indices = (_matrix(column[row]) for column in columns)
                try:
                    top = decompress(logs, indices, config)
                except (RuntimeError, ValueError) as error:
                    raise DamagedFile(
                        f"Parquet {path}, row {row}: {error}; does {CONFIG} belong to it?"
                    ) from None
                yield Rows(torch.tensor([number]), torch.tensor([len(logs)]), encode(form, top))
                number += 1


def _matrix(cell: Any) -> Tensor:
    """A list of equally long lists of bytes as ``(tokens, bytes)`` uint8."""
    values = cell.values
    flat = torch.from_numpy(values.flatten().to_numpy(zero_copy_only=False).copy())
    return flat.reshape(len(values), -1) if len(values) else flat.reshape(0, 0)


def decompress(logs: Tensor, indices: Tensor, config: Compression) -> TopK:
    """The top k of each token from its bytes ``(tokens, bytes)``."""
    tokens, bits = len(logs), (config.d - 1).bit_length()
    exact, rest = _floats(logs, config.exact_k, config.exact_dtype)
    fitted = config.k - config.exact_k
    tail = torch.zeros(tokens, fitted)
    if config.polynomial_terms:
        factors, rest = _floats(rest, len(config.polynomial_terms), config.term_dtype)
        tail += factors @ _curve(config, fitted)
    start = 0
    for part in config.residual_bins:
        scale, rest = _floats(rest, 1, part.scale_dtype)
        size = (part.num_elements * part.element_bits + 7) // 8
        numbers = whole_numbers(rest[:, :size], part.element_bits, part.num_elements)
        low = -(2 ** (part.element_bits - 1))
        signed = numbers * 2.0 - 1.0 if part.element_bits == 1 else (numbers + low).float()
        tail[:, start : start + part.num_elements] += signed * scale
        rest, start = rest[:, size:], start + part.num_elements
    found = torch.cat([exact, tail], -1)
    if config.delta_encoding:
        found = found.cumsum(-1)
    classes = whole_numbers(indices, bits, config.k)
    if rest.shape[-1] or (classes >= config.d).any():
        raise ValueError(f"the bytes are not those of k = {config.k} of {config.d} classes")
    found = found - found.exp().sum(-1, keepdim=True).log().clamp(min=0)  # rounded up above one
    return TopK(classes, found.clamp(max=0), trusted=True)


def _curve(config: Compression, points: int) -> Tensor:
    """The terms at each place ``(terms, points)``."""
    at = torch.linspace(0, 1, points) if config.normalize_t else torch.arange(points, dtype=torch.float32)
    return torch.stack([
        at**term if isinstance(term, int) else getattr(torch, term)(at) for term in config.polynomial_terms or ()
    ])  # fmt: skip


def _floats(raw: Tensor, count: int, dtype: str) -> tuple[Tensor, Tensor]:
    """``count`` numbers of a type from the front of each row, and the bytes behind them."""
    kind = getattr(torch, dtype)
    size = count * kind.itemsize
    if raw.shape[-1] < size:
        raise ValueError(f"{raw.shape[-1]} bytes are left, expected {size}")
    own = raw[:, :size].reshape(-1).clone()  # aligned, whatever stands before it
    return own.view(kind).float().reshape(len(raw), count), raw[:, size:]


def whole_numbers(raw: Tensor, bits: int, count: int) -> Tensor:
    """``count`` numbers of ``bits`` bits from each row's bytes, the most significant bit first ``(rows, count)``."""
    if raw.shape[-1] * 8 < bits * count:
        raise ValueError(f"{raw.shape[-1]} bytes, expected {(bits * count + 7) // 8}")
    single = (raw[..., None] >> torch.arange(7, -1, -1)) & 1
    taken = single.reshape(len(raw), -1)[:, : bits * count].reshape(len(raw), count, bits).long()
    return (taken << torch.arange(bits - 1, -1, -1)).sum(-1)
