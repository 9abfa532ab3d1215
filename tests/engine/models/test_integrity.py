"""What a stage holds still, what is put back, checksums, and train mode for what was handed over."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import toys
from torch import nn

from stillhouse.models.integrity import Counter, StillHeld, checksum, digest, prepare_to_train, versions


def parts(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class TestStillHeld:
    def pair(self) -> tuple[dict[str, nn.Module], StillHeld]:
        return {"student": toys.net(dropout=0.5), "head": nn.Linear(4, 4)}, StillHeld()

    def test_all_but_the_named_ones_without_gradient_in_eval_mode(self):
        models, held = self.pair()
        held.hold(models, ("head",))
        assert not any(parts(models["student"]) + modes(models["student"]))
        assert all(parts(models["head"]) + modes(models["head"]))

    def test_the_next_stage_puts_back_what_it_trains(self):
        models, held = self.pair()
        held.hold(models, ("head",))
        held.hold(models, ("student",))
        assert all(parts(models["student"]) + modes(models["student"]))
        assert not any(parts(models["head"]) + modes(models["head"]))
        held.release()
        assert all(parts(models["head"]) + modes(models["head"]))

    def test_what_the_caller_froze_before_stays_frozen(self):
        models, held = self.pair()
        models["student"][0].requires_grad_(False)
        models["student"][2].eval()
        held.hold(models, ("head",))
        held.release()
        assert parts(models["student"]) == [False, False, True, True]
        assert modes(models["student"]) == [True, True, True, False, True]

    def test_what_the_caller_freezes_while_it_is_trained_stays_frozen(self):
        models, held = self.pair()
        held.hold(models, ("student",))
        models["student"][0].requires_grad_(False)
        models["student"][2].eval()
        held.hold(models, ("head",))
        held.hold(models, ("student",))
        assert parts(models["student"]) == [False, False, True, True]
        assert modes(models["student"]) == [True, True, True, False, True]

    def test_a_part_that_two_modules_share_is_not_held(self):
        student = toys.net()
        models = {"student": student, "tail": student[3]}
        held = StillHeld()
        held.hold(models, ("tail",))
        assert parts(student) == [False, False, True, True]
        assert modes(student) == [False, False, False, False, True]

    def test_says_which_parameters_it_holds(self):
        models, held = self.pair()
        models["student"][0].requires_grad_(False)
        held.hold(models, ("head",))
        own = list(models["student"].parameters())
        assert [held.holds(parameter) for parameter in own] == [False, False, True, True]
        assert not held.holds(models["head"].weight)


class TestChecksum:
    def test_sees_what_the_counts_of_writes_do_not(self):
        net = toys.net()
        before = checksum(net), versions(net)
        net[0].weight.data.flatten()[0] += 1
        assert versions(net) == before[1]
        assert checksum(net) != before[0]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool])
    def test_of_every_type_of_number(self, dtype):
        net = nn.Module()
        net.register_buffer("held", torch.zeros(5, dtype=dtype))
        before = checksum(net)
        net.held[3] = 1
        assert checksum(net) != before

    def test_of_nothing_and_of_what_is_not_there(self):
        net = nn.Module()
        net.register_buffer("none", torch.empty(0))
        net.register_buffer("meta", torch.empty(4, device="meta"))
        assert checksum(net) == 0

    def test_tensors_of_inference_mode_have_no_count(self):
        with torch.inference_mode():
            net = toys.net()
        assert versions(net) == 0


class TestPrepareToTrain:
    def test_wakes_what_was_handed_over_in_eval_mode(self):
        net = toys.net(dropout=0.5).eval()
        prepare_to_train(net)
        assert all(modes(net))

    def test_what_is_frozen_stays_in_eval_mode(self):
        net = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), nn.Linear(4, 4)).eval()
        net[0].requires_grad_(False)
        prepare_to_train(net)
        assert modes(net) == [True, False, False, False, True]

    def test_a_model_in_train_mode_is_left_as_it_is(self):
        net = toys.net(dropout=0.5).train()
        net[2].eval()
        prepare_to_train(net)
        assert not net[2].training


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_counted_model_counts_nothing_here(way):
    net, counter = toys.net(), Counter()
    net.register_forward_pre_hook(counter)
    other = way(net)
    other(toys.rows(2)[0])
    assert counter.calls == 0
    net(toys.rows(2)[0])
    assert counter.calls == 1


def test_a_buffer_that_no_checkpoint_holds_is_in_the_digest():
    def scaled(by: float) -> nn.Module:
        model = nn.Linear(2, 2)
        nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
        model.register_buffer("scale", torch.tensor(by), persistent=False)
        return model

    assert digest(scaled(1.0)) == digest(scaled(1.0))
    assert digest(scaled(1.0)) != digest(scaled(3.0))
