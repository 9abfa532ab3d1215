"""``image-folder``: images of a user's own folders, with models that need no torchvision, and what is refused."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from stillhouse.api import ConfigError, DataError, MissingExtra

pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")

from stillhouse_hf.images import ImageFolder  # noqa: E402


def vit(folder, layers=1, width=16, **config):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(layers)
    sizes = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    ViTForImageClassification(ViTConfig(**sizes, **config)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Red and blue images of several sizes and modes, each in the folder of its class."""
    for name, colour in (("blue", (20, 20, 200)), ("red", (200, 20, 20))):
        (tmp_path / "data" / name / "more").mkdir(parents=True)
        for number in range(12):
            place = tmp_path / "data" / name / ("more" if number % 2 else "")
            made = image.new("RGB", (16 + number, 20), colour)
            made.putpixel((0, 0), (255, 255, number * 10))
            (made.convert("RGBA") if number == 3 else made).save(place / f"{number}.png")
    (tmp_path / "data" / "red" / "notes.txt").write_text("no image")
    return tmp_path


def task(folder, **settings):
    return ImageFolder(ImageFolder.Config(**{"train": str(folder / "data"), "size": 16, **settings}))


def test_images_come_scaled_cut_and_normalised_with_their_folders_class(folder):
    built = task(folder, validation=str(folder / "data"))
    batch = built.splits().train.probe(24)
    assert built.classes == ["blue", "red"]
    assert batch.inputs.shape == (24, 3, 16, 16)
    assert batch.labels.tolist() == [0] * 12 + [1] * 12
    mean, std = (torch.tensor(getattr(built.config, name))[:, None, None] for name in ("mean", "std"))
    pixels = (batch.inputs[0] * std + mean)[:, 8, 8] * 255
    assert torch.allclose(pixels, torch.tensor([20.0, 20.0, 200.0]), atol=0.5)


def test_without_validation_images_a_tenth_is_kept_apart(folder):
    splits = task(folder).splits()
    assert (len(splits.train), len(splits.validation)) == (22, 2)


def test_init_run_and_export_make_a_checkpoint(cli, folder):
    from transformers import AutoModelForImageClassification

    vit(folder / "teacher", 2, 24, id2label={0: "blue", 1: "red"})
    vit(folder / "student")
    assert (said := cli("init", "image-folder")).code == 0, said.err
    said = cli(
        "run",
        "image-folder.yaml",
        "steps=60",
        "batch_size=8",
        "task.size=16",
        "threads=1",
        "method=hard_labels",
        "teacher=null",
    )
    assert said.code == 0, said.err
    assert (said := cli("export", "runs/image-folder", "--out", "trained")).code == 0, said.err
    assert AutoModelForImageClassification.from_pretrained(folder / "trained").config.id2label == {
        0: "blue",
        1: "red",
    }
    said = cli(
        "run",
        "image-folder.yaml",
        "steps=8",
        "batch_size=8",
        "task.size=16",
        "threads=1",
        "teacher.path=trained",
        "out=runs/kd",
    )
    assert said.code == 0, said.err
    summary = json.loads((folder / "runs" / "kd" / "summary.json").read_text())
    assert summary["teacher"]["accuracy"] == 1.0


class TestRefused:
    """Before anything is trained."""

    def test_folders_that_hold_no_classes(self, folder):
        for train, said in (
            ("", r"task\.train is not set"),
            (str(folder / "nowhere"), "no such folder"),
            (str(folder / "data" / "red" / "more"), "no image in a folder of its class"),
        ):
            with pytest.raises((ConfigError, DataError), match=said):
                task(folder, train=train).splits()
        (folder / "one" / "red").mkdir(parents=True)
        image.new("RGB", (4, 4)).save(folder / "one" / "red" / "a.png")
        with pytest.raises(DataError, match="the class red alone"):
            task(folder, train=str(folder / "one")).splits()

    def test_a_class_that_training_never_saw(self, folder):
        (folder / "other" / "green").mkdir(parents=True)
        image.new("RGB", (4, 4)).save(folder / "other" / "green" / "a.png")
        with pytest.raises(DataError, match="the validation images have the class green"):
            task(folder, validation=str(folder / "other")).splits()

    def test_a_file_that_is_no_image(self, folder):
        (folder / "data" / "blue" / "0.png").write_text("no image")
        with pytest.raises(DataError, match=r"0\.png can't be read as an image"):
            task(folder, validation=str(folder / "data")).splits().train.probe(4)

    def test_a_teacher_with_the_classes_in_another_order(self, folder):
        vit(folder / "teacher", id2label={0: "red", 1: "blue"})
        with pytest.raises(ConfigError, match="has the classes red, blue"):
            task(folder).teachers["pretrained"](path=str(folder / "teacher"))


class TestOtherLibraries:
    """timm and torchvision, by name."""

    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_without_the_library_the_extra_is_named(self, folder, library, monkeypatch):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingExtra, match=r"stillhouse\[vision\]"):
            task(folder).students[library](model="resnet18")

    def test_a_torchvision_of_another_torch_is_told_apart_from_none(self, folder, monkeypatch):
        (folder / "torchvision.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')"
        )
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        monkeypatch.syspath_prepend(folder)
        with pytest.raises(ConfigError, match=r"nms does not exist.*made for this torch"):
            task(folder).students["torchvision"]()

    def test_a_model_is_made_for_the_folders_classes(self, folder, monkeypatch):
        asked = {}

        def make(name, **given):
            if name == "none":
                raise RuntimeError("Unknown model")
            asked[name] = given
            return nn.Linear(2, 2)

        timm = ModuleType("timm")
        timm.create_model = make
        monkeypatch.setitem(sys.modules, "timm", timm)
        task(folder).students["timm"](model="resnet10t")
        assert asked == {"resnet10t": {"num_classes": 2}}
        with pytest.raises(ConfigError, match="timm has no model 'none'"):
            task(folder).students["timm"](model="none")

    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_a_real_model_gives_an_output_for_each_class(self, folder, library):
        try:
            __import__(library)
        except Exception as error:  # torchvision fails in its own way beside another torch
            pytest.skip(f"{library} does not import here: {error}")
        model = task(folder).students[library](model="resnet18").eval()
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
