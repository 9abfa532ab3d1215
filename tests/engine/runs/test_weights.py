"""Files hold the plain model's names, and go into a plain or a wrapped one."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

from stillhouse.errors import ConfigError
from stillhouse.runs.weights import check_saveable, fill, plain_state


def inner_compiled():
    net = toys.net(seed=1)
    net[0] = torch.compile(net[0], backend="eager")
    return net


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: nn.DataParallel(toys.net(seed=1)),
        lambda: torch.compile(toys.net(seed=1), backend="eager"),
        lambda: nn.DataParallel(torch.compile(toys.net(seed=1), backend="eager")),
        inner_compiled,
    ],
)
def test_wrappers_leave_no_trace(wrapped):
    plain = toys.net(seed=1).state_dict()
    found = plain_state(wrapped())
    assert found.keys() == plain.keys()
    again = wrapped()
    fill(again, {name: tensor + 1 for name, tensor in plain.items()}, "weights")
    for name, tensor in plain_state(again).items():
        assert torch.equal(tensor, plain[name] + 1)


def test_a_module_that_is_called_module_keeps_its_name():
    net = nn.Module()
    net.module = nn.Linear(2, 2)
    assert set(plain_state(net)) == {"module.weight", "module.bias"}


def test_what_can_not_be_written_is_told():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(
        ConfigError, match="'_extra_state' of the model's state_dict is dict; expected tensors alone"
    ):
        check_saveable(Extra(2, 2))
    sparse = nn.Module()
    sparse.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(
        ConfigError, match=r"'graph' of the model is torch\.sparse_coo; expected a dense tensor"
    ):
        check_saveable(sparse)
