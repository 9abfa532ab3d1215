"""Splits from what a user has: tensors, anything with ``__len__`` and ``__getitem__``, DataLoaders, iterables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stillhouse.contract.batch import tensors_in
from stillhouse.contract.datasets import DatasetSplit, IterableSplit, collated
from stillhouse.contract.kinds import LABEL_NAMES, TaskKind
from stillhouse.contract.loader import loading_of, order_of
from stillhouse.contract.splits import Split, Splits, TensorSplit
from stillhouse.errors import ConfigError, DataError, nearest
from stillhouse.models.calling import DEFAULT

SPLITS = ("train", "validation", "test", "unlabelled")


def sample(data: Any) -> Any:
    """One row of the training data as its loader gives it, or the tensors themselves."""
    if isinstance(data, Splits):
        return data.train.probe(1)
    if isinstance(data, Mapping) and data.get("train") is not None:
        data = data["train"]
    if isinstance(data, DataLoader):
        if not isinstance(data.dataset, IterableDataset):
            return _first(data.dataset, data.collate_fn)
        return next(iter(data), None)
    if isinstance(data, IterableDataset):
        return next(iter(DataLoader(data, batch_size=1)), None)
    return _first(data, collated) if _rows(data) else data


def _first(dataset: Any, collate: Any) -> Any:
    """The first row, read as one of the split is; None where there is none, which is told later."""
    if not hasattr(dataset, "__len__") or not len(dataset):
        return None
    return collate(DatasetSplit(dataset).items([0]))


def as_splits(
    data: Any, kind: TaskKind = DEFAULT, batch_size: int | None = None, workers: int | None = None
) -> Splits:
    """Splits from what a user has.

    batch_size, workers
        What the run states in place of what a DataLoader says.

    Raises DataError for what can't be read, ConfigError for a loader that can't be used so.
    """
    if isinstance(data, Splits):
        return replace(data)
    if isinstance(data, Mapping) and not _is_batch(data):
        unknown = [name for name in data if name not in SPLITS]
        if unknown:
            raise DataError(f"data has a split '{unknown[0]}'{nearest(str(unknown[0]), SPLITS)}")
        if data.get("train") is None:
            raise DataError(f"data has the splits {', '.join(data) or 'none'}; expected 'train' among them")
        return Splits(
            **{
                name: as_split(value, name, kind, batch_size, workers)
                for name, value in data.items()
                if value is not None
            }
        )
    return Splits(as_split(data, "train", kind, batch_size, workers))


def as_split(
    data: Any,
    name: str,
    kind: TaskKind = DEFAULT,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Split:
    """One split from tensors, a dataset or a DataLoader; see ``as_splits``."""
    if isinstance(data, TensorSplit | DatasetSplit | IterableSplit):
        return data
    if _is_tensors(data):
        batch = kind.read(data)
        return TensorSplit(batch.inputs, batch.labels, batch.teacher_inputs, batch.mask)
    labelled = name != "unlabelled"
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size or 128, num_workers=workers or 0)
    if isinstance(data, DataLoader):
        return _from_loader(data, name, kind, batch_size, labelled=labelled)
    if _rows(data):
        return DatasetSplit(data, labelled, kind=kind)
    what = type(data).__name__
    if isinstance(data, tuple | list) and data:
        what += f" of {', '.join(type(item).__name__ for item in data[:3])}"
    raise DataError(
        f"the {name} split is {what}; expected tensors (torch.as_tensor makes one of an array), (inputs, labels), "
        "a dataset with __len__ and __getitem__, an IterableDataset, or a DataLoader of one"
    )


def _from_loader(
    loader: DataLoader[Any], name: str, kind: TaskKind, batch_size: int | None, *, labelled: bool
) -> Split:
    loading = loading_of(loader)
    if isinstance(loader.dataset, IterableDataset):
        if loader.batch_size is not None and batch_size not in (None, loader.batch_size):
            raise ConfigError(
                f"batch_size is {batch_size}, and the {name} split's loader makes batches of {loader.batch_size}; of an "
                "iterable these come as they are: leave batch_size out, or make the loader with it"
            )
        return IterableSplit(loader, labelled, kind, name)
    if not hasattr(loader.dataset, "__len__"):
        raise DataError(
            f"the {name} split's dataset ({type(loader.dataset).__name__}) has no length; expected __len__ and "
            "__getitem__, or an IterableDataset"
        )
    rows, batches = (None, None) if not len(loader.dataset) else order_of(loader, name, batch_size)
    return DatasetSplit(
        loader.dataset,
        labelled,
        collate=loader.collate_fn,
        kind=kind,
        rows=rows,
        loading=loading,
        batches=batches,
    )


def batch_size_of(data: Any) -> int | None:
    """The batch size of the training data's DataLoader, where it has one."""
    if isinstance(data, Mapping):
        data = data.get("train")
    if not isinstance(data, DataLoader):
        return None
    own = data.batch_size
    return own if own is not None else getattr(data.batch_sampler, "batch_size", None)


def _is_tensors(data: Any) -> bool:
    """Whether it is a split held in memory: inputs, or (inputs, labels), of tensors."""
    if isinstance(data, Tensor) or _is_batch(data):
        return True
    if not isinstance(data, tuple | list) or len(data) not in (1, 2):
        return False
    inputs, *labels = data
    held = isinstance(inputs, Tensor) or (
        isinstance(inputs, Mapping)
        and bool(tensors_in(inputs))
        and all(isinstance(x, Tensor) for x in inputs.values())
    )
    return held and all(isinstance(label, Tensor) for label in labels)


def _is_batch(data: Any) -> bool:
    """Whether it is a mapping of tensors with all rows: input_ids, attention_mask, labels."""
    return (
        isinstance(data, Mapping)
        and bool(data)
        and all(isinstance(value, Tensor) for value in data.values())
        and any(name in data for name in (*LABEL_NAMES, "input_ids", "attention_mask"))
    )


def _rows(data: Any) -> bool:
    """Whether it has rows by number: a protocol, whatever its class. A pair of arrays is no dataset of two rows."""
    if isinstance(data, str | bytes | Mapping) or hasattr(data, "__array__"):
        return False
    if isinstance(data, tuple | list):
        return bool(data) and all(isinstance(item, tuple | list | Mapping) for item in data)
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")
