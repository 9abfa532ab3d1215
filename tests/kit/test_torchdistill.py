"""Losses of torchdistill as methods: the same number and gradient as calling them by hand, features, heads, errors."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import toys
from torch.utils.hooks import RemovableHandle

from stillhouse.contract.batch import Batch
from stillhouse.errors import ConfigError, MissingExtra
from stillhouse.training.step import DistillStep

mid_level = pytest.importorskip("torchdistill.losses.mid_level")

KD = {"loss": "KDLoss", "arguments": {"temperature": 3.0, "alpha": 0.4}}
PAIR = {"student": {"io": "output", "path": "0"}, "teacher": {"io": "output", "path": "0"}, "weight": 2.0}


def step(**settings: object) -> DistillStep:
    data = toys.splits()
    return DistillStep(
        {"name": "torchdistill", **settings},
        student=toys.net(8, seed=1),
        teacher=toys.net(16, seed=2),
        probe=data.train.batch(torch.arange(4)),
        splits=data,
    )


def by_hand(student, teacher, inputs) -> tuple[dict, dict]:
    """The dictionaries that torchdistill's own forward hooks would make."""
    found: tuple[dict, dict] = ({}, {})
    handles: list[RemovableHandle] = []
    for model, io in zip((student, teacher), found, strict=True):
        for name, module in model.named_modules():

            def keep(module, given, output, io=io, name=name or ".") -> None:
                io[name] = {"input": given[0], "output": output}

            handles.append(module.register_forward_hook(keep))
    student(inputs)
    with torch.no_grad():
        teacher(inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("KDLoss", {"temperature": 3.0, "alpha": 0.4}),
        ("RKDLoss", {"dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"}),
        ("SPKDLoss", {"reduction": "batchmean"}),
        ("DISTLoss", {}),
        ("LogitStdKDLoss", {"temperature": 2.0, "alpha": 0.5}),
        (
            "PKTLoss",
            {
                "student_module_path": "3",
                "student_module_io": "input",
                "teacher_module_path": "3",
                "teacher_module_io": "input",
            },
        ),
        (
            "AltActTransferLoss",
            {
                "feature_pairs": {
                    "one": {
                        "student": {"io": "output", "path": "3"},
                        "teacher": {"io": "output", "path": "3"},
                    }
                },
                "margin": 1.0,
                "reduction": "mean",
            },
        ),
    ],
)
def test_value_and_gradient_are_those_of_the_loss_called_by_hand(name, arguments):
    made = step(loss=name, arguments=arguments)
    inputs, labels = toys.rows(8, 5)
    student = made.run.student
    loss, _ = made(student, Batch(inputs, labels, torch.arange(8)))
    loss.backward()
    got = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    full = dict.fromkeys(
        (
            "student_module_path",
            "teacher_module_path",
            "student_output_path",
            "teacher_output_path",
            "student_logit_module_path",
            "teacher_logit_module_path",
        ),
        ".",
    )
    sides = dict.fromkeys(
        ("student_module_io", "teacher_module_io", "student_logit_module_io", "teacher_logit_module_io"),
        "output",
    )
    kind = getattr(mid_level, name)
    takes = inspect.signature(kind).parameters
    known = {key: value for key, value in {**full, **sides}.items() if key in takes}
    expected = kind(**{**known, **arguments})(*by_hand(student, made.teacher, inputs), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, [p.grad for p in student.parameters() if p.grad is not None])


def test_a_module_deep_in_the_models_is_found_and_captured():
    made = step(
        loss="RKDLoss",
        arguments={
            "student_output_path": "0",
            "teacher_output_path": "0",
            "dist_factor": 1.0,
            "angle_factor": 0.0,
            "reduction": "mean",
        },
    )
    assert made.captures.asked("teacher")
    inputs, labels = toys.rows(8, 5)
    loss, _ = made(made.run.student, Batch(inputs, labels))
    assert float(loss.detach()) > 0


@pytest.mark.parametrize(
    ("loss", "arguments", "head"),
    [
        (
            "VIDLoss",
            {"feature_pairs": {"one": {**PAIR, "student": {"io": "output", "path": "mean"}}}},
            {"mean": {"path": "0", "width": 16, "kind": "gaussian"}},
        ),
        (
            "CCKDLoss",
            {
                "student_linear_path": "mine",
                "teacher_linear_path": "0",
                "kernel_config": {"type": "bilinear"},
                "reduction": "batchmean",
            },
            {"mine": {"path": "0", "width": 16}},
        ),
    ],
)
def test_heads_that_a_loss_expects_are_trained_beside_the_student(loss, arguments, head):
    (name,) = head
    loop = toys.loop(
        {"name": "torchdistill", "loss": loss, "arguments": arguments, "heads": head, "ce_weight": 1.0}
    )
    before = toys.weights(loop.step.run.models[f"torchdistill.{name}"])
    loop.run()
    assert not toys.same_bits(before, loop.step.run.models[f"torchdistill.{name}"])


def test_the_memory_of_crd_is_found_by_sample_id_and_travels_in_checkpoints():
    arguments = {
        "student_norm_module_path": "s",
        "teacher_norm_module_path": "t",
        "student_empty_module_path": "sample_ids",
        "input_size": 4,
        "output_size": 48,
        "num_negative_samples": 8,
        "num_samples": 48,
    }
    heads = {
        "s": {"path": "0", "width": 4, "kind": "unit"},
        "t": {"role": "teacher", "path": "0", "width": 4, "kind": "unit"},
    }
    loop = toys.loop({"name": "torchdistill", "loss": "CRDLoss", "arguments": arguments, "heads": heads})
    before = toys.weights(loop.step.run.models["torchdistill.loss"])
    loop.run(3)
    assert not toys.same_bits(before, loop.step.run.models["torchdistill.loss"])
    assert any("memory" in key for key in loop.state_dict()["models"]["torchdistill.loss"])


def test_a_weighted_sum_of_losses_is_one_too():
    terms = {
        "kd": {
            "criterion": {
                "key": "KDLoss",
                "kwargs": {
                    "student_module_path": ".",
                    "student_module_io": "output",
                    "teacher_module_path": ".",
                    "teacher_module_io": "output",
                    "temperature": 1.0,
                    "alpha": 0.0,
                    "beta": 1.0,
                },
            },
            "weight": 2.0,
        },
    }
    inputs, labels = toys.rows(8, 5)
    losses = []
    for settings in (
        {"loss": "WeightedSumLoss", "arguments": {"sub_terms": terms}},
        {"loss": "KDLoss", "arguments": {"temperature": 1.0, "alpha": 0.0, "beta": 1.0}, "weight": 2.0},
    ):
        made = step(**settings)
        losses.append(made(made.run.student, Batch(inputs, labels))[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_masked_samples_are_taken_out():
    made = step(**KD)
    inputs, labels = toys.rows(8, 5)
    mask = torch.arange(8) < 5
    masked, _ = made(made.run.student, Batch(inputs, labels, mask=mask))
    alone, _ = made(made.run.student, Batch(inputs[:5], labels[:5]))
    torch.testing.assert_close(masked, alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "KDLos"}, r"method\.loss: torchdistill has no loss 'KDLos'; it has .*KDLoss"),
        ({"loss": "KDLoss"}, r"method\.arguments: KDLoss\(.*missing.*temperature"),
        (
            {
                "loss": "RKDLoss",
                "arguments": {
                    "student_output_path": "nine",
                    "dist_factor": 1,
                    "angle_factor": 1,
                    "reduction": "mean",
                },
            },
            r"student\.nine: no such module",
        ),
        (
            {"loss": "KTALoss", "arguments": {"knowledge_translator_path": "0", "feature_adapter_path": "3"}},
            r"KTALoss fails on the first rows",
        ),
        ({"loss": "FTLoss"}, r"paraphraser: no such module"),
        ({"loss": "os.system"}, r"torchdistill has no loss 'os\.system'"),
    ],
)
def test_what_does_not_fit_is_refused_before_step_0(settings, message):
    with pytest.raises(ConfigError, match=message):
        step(**settings)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdistill.losses", None)
    with pytest.raises(MissingExtra, match=r"pip install 'stillhouse\[torchdistill\]'"):
        step(**KD)
