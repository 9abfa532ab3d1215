"""A teacher is trained once and kept by what its weights depend on."""

from __future__ import annotations

import pytest
import torch
import toys
from safetensors.torch import save_file
from torch import nn

from stillhouse.config import Training
from stillhouse.contract.splits import Splits, TensorSplit
from stillhouse.contract.task import Task
from stillhouse.errors import CheckpointError, ConfigError, Diverged
from stillhouse.files.tensors import read_tensors, write_tensors
from stillhouse.models.integrity import digest
from stillhouse.runs import teachers

SETTINGS = {"steps": 5, "batch_size": 8}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def trained(
    data: Splits | None = None,
    named: dict | None = None,
    hidden: int = 8,
    say=lambda message: None,
    **settings,
):
    build = lambda: nn.Sequential(
        nn.Linear(toys.FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, toys.CLASSES)
    )
    model, facts = teachers.trained(
        build,
        named or {"name": "mlp"},
        data or toys.splits(),
        Training.model_validate({**SETTINGS, **settings}),
        torch.device("cpu"),
        say,
    )
    return model, facts


def test_a_second_run_does_not_train_it_again(monkeypatch):
    first, facts = trained()
    assert facts["found"] == "trained"
    monkeypatch.setattr(teachers.Loop, "run", lambda *given: pytest.fail("trained again"))
    second, found = trained()
    assert found["found"] == "kept"
    assert found["digest"] == facts["digest"]
    assert toys.same_bits(first, second)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data": toys.splits(train=47)}, "data"),
        ({"named": {"name": "mlp", "layers": 2}}, "builder"),
        ({"hidden": 9}, "architecture"),
        ({"steps": 6}, "training"),
        ({"seed": 1}, "training"),
        ({"optimizer": {"lr": 2e-3}}, "training"),
        ({"precision": "bf16"}, "training"),
    ],
)
def test_is_another_one_where_anything_changes_that_its_weights_depend_on(change, field):
    _first, before = trained()
    _second, after = trained(**change)
    assert after["found"] == "trained"
    assert [
        name for name in ("data", "builder", "architecture", "training") if before[name] != after[name]
    ] == [field]


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"cache_teacher": False}])
def test_is_the_same_where_its_weights_do_not_depend_on_it(change):
    trained()
    assert trained(**change)[1]["found"] == "kept"


def test_data_that_only_the_student_reads_do_not_matter():
    trained(toys.splits(unlabelled=10))
    assert trained(toys.splits(unlabelled=20))[1]["found"] == "kept"


def test_one_that_cannot_be_kept_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    said = []
    _, facts = trained(say=said.append)
    assert facts["found"] == "trained"
    assert any("not kept for the next time" in line and "$STILLHOUSE_CACHE" in line for line in said)


def test_the_digest_is_that_of_its_weights():
    first, facts = trained()
    assert facts["digest"] == digest(first)
    assert trained(seed=1)[1]["digest"] != facts["digest"]


def test_a_flipped_bit_is_found_and_told(tmp_path):
    first, _ = trained()
    path = next((tmp_path / "cache" / "teachers").iterdir())
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 8):
        changed = bytearray(whole)
        changed[place] ^= 16
        path.write_bytes(changed)
        said = []
        again, facts = trained(say=said.append)
        assert facts["found"] == "trained"
        assert "it is made anew" in said[0]
        assert toys.same_bits(first, again)


@pytest.mark.parametrize("damage", ["truncated", "another's"])
def test_a_damaged_file_is_trained_anew(tmp_path, damage):
    first, _ = trained()
    path = next((tmp_path / "cache" / "teachers").iterdir())
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    else:
        tensors, _ = read_tensors(path)
        write_tensors(path, tensors, {"made_from": "{}"})
    again, facts = trained()
    assert facts["found"] == "trained"
    assert toys.same_bits(first, again)


def test_one_whose_training_diverged_is_not_kept(tmp_path):
    with pytest.raises(
        Diverged, match=r"after 5 updates '0\.weight' holds NaN or infinity; lower teacher\.train"
    ):
        trained(optimizer={"name": "SGD", "lr": 1e30})
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_learns_from_its_own_view():
    x, y = toys.rows(30)
    other = toys.rows(30, 9)[0]
    seen = teachers.teacher_view(TensorSplit(x, y, teacher_inputs=other))
    assert torch.equal(seen.inputs, other)
    assert torch.equal(seen.labels, y)


class TestCheckpoints:
    def test_are_read(self, tmp_path):
        save_file(toys.net(seed=3).state_dict(), tmp_path / "t.safetensors")
        model = toys.net(seed=4)
        teachers.load(model, tmp_path / "t.safetensors")
        assert toys.same_bits(model, toys.net(seed=3))

    @pytest.mark.parametrize("kind", [torch.int32, torch.complex64, torch.bool])
    def test_of_another_kind_of_number_are_refused(self, tmp_path, kind):
        state = toys.net().state_dict()
        save_file({**state, "0.weight": state["0.weight"].to(kind)}, tmp_path / "t.safetensors")
        with pytest.raises(CheckpointError, match=r"'0\.weight' is torch\..*a cast would change them"):
            teachers.load(toys.net(), tmp_path / "t.safetensors")

    def test_that_hold_nan_are_refused(self, tmp_path):
        net = toys.net()
        with torch.no_grad():
            net[0].weight[0, 0] = torch.nan
        save_file(net.state_dict(), tmp_path / "nan.safetensors")
        with pytest.raises(Diverged, match=r"'0\.weight' holds NaN"):
            teachers.load(toys.net(), tmp_path / "nan.safetensors")

    @pytest.mark.parametrize(
        ("state", "said"),
        [
            ({**toys.net(9).state_dict()}, "'0.bias' is (9,), the model has (8,)"),
            ({k: v for k, v in toys.net().state_dict().items() if k != "3.bias"}, "'3.bias' is missing"),
            ({**toys.net().state_dict(), "head": torch.zeros(1)}, "the model has no such entry"),
        ],
    )
    def test_that_do_not_fit_are_refused_naming_the_tensor(self, tmp_path, state, said):
        save_file(state, tmp_path / "t.safetensors")
        with pytest.raises(CheckpointError) as caught:
            teachers.load(toys.net(), tmp_path / "t.safetensors")
        assert said in str(caught.value)
        assert "give the builder the arguments" in str(caught.value)

    @pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
    def test_that_can_not_be_read_are_refused(self, tmp_path, content):
        path = tmp_path / "t.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"can't be read: .* expected a safetensors file"):
            teachers.load(toys.net(), path)


def test_training_settings_are_checked_with_their_path():
    with pytest.raises(ConfigError, match=r"teacher\.train\.stpes: unknown; did you mean 'steps'"):
        teachers.training({"stpes": 3}, Task())
    with pytest.raises(ConfigError, match=r"teacher\.train\.steps: "):
        teachers.training({"steps": 0}, Task())
