"""A task over a folder of images, one folder a class: models of transformers, timm and torchvision."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    Builder,
    ConfigError,
    DataError,
    DatasetSplit,
    MissingExtra,
    Splits,
    Task,
    TaskConfig,
)
from stillhouse_hf.models import Models

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


class ImageConfig(TaskConfig):
    """Folders and how their images are read."""

    train: str = Field("", description="A folder with a folder of images for each class.")
    validation: str = Field(
        "", description="The same; without it a tenth of the training images is kept apart."
    )
    test: str = Field("", description="The same; without it there is no test split.")
    size: int = Field(
        224, gt=0, description="Pixels of a side: the shorter one is scaled to it, the middle cut out."
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="Taken off red, green and blue."
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="What they are divided by then."
    )
    seed: int = Field(0, ge=0, description="Of the division into training and validation images.")


class Images:
    """Images of files as ``(3, size, size)``, read when they are asked for, with their class numbers."""

    def __init__(self, rows: list[tuple[Path, int]], config: ImageConfig) -> None:
        self._rows, self._size = rows, config.size
        self._mean = torch.tensor(config.mean)[:, None, None]
        self._std = torch.tensor(config.std)[:, None, None]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path, label = self._rows[number]
        return self._read(path), label

    def _read(self, path: Path) -> Tensor:
        image = _pillow()
        try:
            with image.open(path) as opened:
                found = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} can't be read as an image ({error}); mend it, or take it away") from None
        size, scale = self._size, self._size / min(found.size)
        found = found.resize([max(size, round(side * scale)) for side in found.size])
        left, top = ((side - size) // 2 for side in found.size)
        pixels = np.asarray(found.crop((left, top, left + size, top + size)))
        return (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - self._mean) / self._std


class ImageFolder(Task):
    """A class for each image, named by its folder."""

    api_version = 1
    Config = ImageConfig
    config: ImageConfig
    name: ClassVar[str] = "image-folder"
    teacher_training: ClassVar[dict[str, Any]] = {"steps": 1000, "optimizer": {"lr": 1e-3}}

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._splits: Splits | None = None
        self.classes: list[str] = []

        def teacher(path: str = "", layers: int | None = None) -> nn.Module:
            return self._models().teacher(path, layers)

        def pretrained(path: str = "", layers: int | None = None) -> nn.Module:
            return self._models().pretrained(path, layers)

        def fresh(path: str = "", layers: int | None = None, width: int | None = None) -> nn.Module:
            return self._models().fresh(path, layers, width)

        def timm(model: str = "resnet18") -> nn.Module:
            return _built("timm", model, lambda found: found.create_model, len(self._named()))

        def torchvision(model: str = "resnet18") -> nn.Module:
            return _built("torchvision", model, lambda found: found.models.get_model, len(self._named()))

        teacher.trained = True  # type: ignore[attr-defined]
        others: dict[str, Builder] = {"timm": timm, "torchvision": torchvision}
        self.teachers: Mapping[str, Builder] = {"pretrained": teacher, **others}  # type: ignore[misc]
        self.students: Mapping[str, Builder] = {"pretrained": pretrained, "fresh": fresh, **others}  # type: ignore[misc]

    def _models(self) -> Models:
        return Models(self.name, classes=self._named())

    def _named(self) -> list[str]:
        self.splits()
        return self.classes

    def splits(self) -> Splits:
        if self._splits is None:
            self._splits = self._read()
        return self._splits

    def _read(self) -> Splits:
        config = self.config
        if not config.train:
            raise ConfigError(
                "task.train is not set; expected a folder with a folder of images for each class"
            )
        _pillow()
        found = {"train": _images(config.train)}
        found |= {name: _images(path) for name in ("validation", "test") if (path := getattr(config, name))}
        self.classes = sorted({name for _, name in found["train"]})
        if len(self.classes) < 2:
            raise DataError(
                f"{config.train} has the class {self.classes[0]} alone; expected two folders at least"
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        rows: dict[str, list[tuple[Path, int]]] = {}
        for split, images in found.items():
            if unknown := sorted({name for _, name in images} - numbers.keys()):
                raise DataError(
                    f"the {split} images have the class {unknown[0]}, which no training image has; known: "
                    f"{', '.join(self.classes[:8])}"
                )
            rows[split] = [(path, numbers[name]) for path, name in images]
        if "validation" not in rows:
            every = rows["train"]
            order = torch.randperm(len(every), generator=torch.Generator().manual_seed(config.seed)).tolist()
            count = max(1, len(every) // 10)
            rows["train"] = [every[number] for number in sorted(order[count:])]
            rows["validation"] = [every[number] for number in sorted(order[:count])]
        return Splits(**{name: DatasetSplit(Images(own, config), fixed=True) for name, own in rows.items()})


def _images(path: str) -> list[tuple[Path, str]]:
    """Every image under a folder, and the folder directly below it that it lies in."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{path}: no such folder; expected one with a folder of images for each class")
    found = [
        (file, file.relative_to(root).parts[0])
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.parent != root and file.is_file()
    ]
    if not found:
        raise DataError(
            f"{path} has no image in a folder of its class; expected files as {', '.join(SUFFIXES[:3])}"
        )
    return found


def _built(library: str, model: str, made: Any, classes: int) -> nn.Module:
    try:
        found = importlib.import_module(library)
    except ImportError as error:
        raise MissingExtra(f"the model '{model}' of {library}", error.name or library, "vision") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{library} does not import beside torch {torch.__version__} ({reason}); expected a torchvision made for this "
            "torch: install both from one index, or use a model of transformers, which needs neither"
        ) from error
    try:
        return made(found)(model, num_classes=classes)  # type: ignore[no-any-return]
    except Exception as error:
        raise ConfigError(f"{library} has no model '{model}' ({error}); expected one of its names") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("task 'image-folder'", "pillow", "vision") from None
    return Image
