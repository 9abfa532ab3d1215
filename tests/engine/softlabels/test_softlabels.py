"""Kept soft labels: found by sample id, bound to what made them."""

from __future__ import annotations

import pytest
import torch
import toys

from stillhouse.errors import CheckpointError
from stillhouse.softlabels import SoftLabels, write_soft_labels

CPU = torch.device("cpu")
MADE_FROM = {"model": "abc", "data": "def"}


def made(rows: int = 20, batch_size: int = 7, **given) -> tuple[SoftLabels, int]:
    return write_soft_labels(
        toys.net(dropout=0.5), toys.splits(rows).train, MADE_FROM, device=CPU, batch_size=batch_size, **given
    )


def test_one_pass_in_eval_mode_in_row_order():
    labels, passes = made()
    assert (len(labels), passes) == (20, 3)
    expected = toys.net().eval()(toys.splits(20).train.inputs)
    torch.testing.assert_close(labels.logits, expected, rtol=1e-5, atol=1e-6)


def test_are_found_by_id_in_any_order():
    labels, _ = made()
    ids = torch.tensor([7, 0, 7, 19])
    assert torch.equal(labels.lookup(ids), labels.logits[[7, 0, 7, 19]])


def test_come_back_bit_for_bit(tmp_path):
    labels, _ = made()
    labels.save(tmp_path / "x.safetensors")
    again = SoftLabels.load(tmp_path / "x.safetensors", MADE_FROM, CPU)
    assert torch.equal(again.logits, labels.logits)
    assert again.fingerprint == MADE_FROM


@pytest.mark.parametrize(
    ("expected", "field"),
    [
        ({"model": "abc", "data": "xyz"}, "data"),
        ({"model": "abc"}, "data"),
        ({**MADE_FROM, "stage": "x"}, "stage"),
    ],
)
def test_of_another_origin_are_refused_naming_the_field(tmp_path, expected, field):
    made()[0].save(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"were made with {field} = .*, this run has "):
        SoftLabels.load(tmp_path / "x.safetensors", expected, CPU)


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_that_can_not_be_read_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"can't be read"):
        SoftLabels.load(path, MADE_FROM, CPU)


def test_taking_them_leaves_the_models_mode_alone():
    net = toys.net(dropout=0.5).train()
    net[2].eval()
    write_soft_labels(net, toys.splits().train, MADE_FROM, device=CPU)
    assert net.training
    assert net[0].training
    assert not net[2].training
