"""Every loss that torchdistill registers, by name and arguments, trains a student of convolutions."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

from stillhouse.api import Splits, TensorSplit

registry = pytest.importorskip("torchdistill.losses.registry")
pytest.importorskip("torchdistill.losses.mid_level")
pytest.importorskip("torchdistill.losses.high_level")

MODULE = {"io": "output", "path": "0"}
PAIR = {"one": {"student": MODULE, "teacher": MODULE}}
DEEP = {"io": "output", "path": "2"}
HEAD = {"path": "2", "width": 6}
KD = {
    "criterion": {
        "key": "KDLoss",
        "kwargs": {
            **dict.fromkeys(("student_module_path", "teacher_module_path"), "."),
            **dict.fromkeys(("student_module_io", "teacher_module_io"), "output"),
            "temperature": 4.0,
            "alpha": 0.5,
        },
    },
    "weight": 1.0,
}
FEATURES = dict.fromkeys(("student_feature_module_path", "teacher_feature_module_path"), "0")

LOSSES = {  # arguments, and heads where the paper's method trains modules beside the student
    "ATLoss": ({"at_pairs": PAIR}, {}),
    "AffinityLoss": ({"student_module_path": "0", "teacher_module_path": "0"}, {}),
    "AltActTransferLoss": ({"feature_pairs": PAIR, "margin": 1.0, "reduction": "mean"}, {}),
    "AuxSSKDLoss": ({"module_path": "ss"}, {"ss": {"path": "6", "width": 6, "role": "teacher"}}),
    "CCKDLoss": (
        {
            "student_linear_path": ".",
            "teacher_linear_path": ".",
            "kernel_config": {"type": "gaussian", "gamma": 0.4, "max_p": 2},
            "reduction": "batchmean",
        },
        {},
    ),
    "CRDLoss": (
        {
            "student_norm_module_path": "s",
            "teacher_norm_module_path": "t",
            "student_empty_module_path": "sample_ids",
            "input_size": 4,
            "output_size": 32,
            "num_negative_samples": 8,
            "num_samples": 32,
        },
        {
            "s": {"path": ".", "width": 4, "kind": "unit"},
            "t": {"path": ".", "width": 4, "kind": "unit", "role": "teacher"},
        },
    ),
    "ChSimLoss": ({"feature_pairs": PAIR}, {}),
    "DISTLoss": ({}, {}),
    "DISTPlusLoss": (FEATURES, {}),
    "FSPLoss": (
        {
            "fsp_pairs": {
                "one": {
                    "student_first": MODULE,
                    "student_second": DEEP,
                    "teacher_first": MODULE,
                    "teacher_second": DEEP,
                }
            }
        },
        {},
    ),
    "FTLoss": (
        {"p": 1, "paraphraser_path": "para", "translator_path": "trans"},
        {"para": {**HEAD, "role": "teacher"}, "trans": HEAD},
    ),
    "HierarchicalContextLoss": (
        {"student_module_path": "fused", "teacher_module_path": "2", "output_sizes": [2, 1]},
        {"fused": {"path": "2", "width": 5, "kind": "gaussian"}},  # it reads the first of two outputs
    ),
    "KDLoss": ({"temperature": 4.0, "alpha": 0.5}, {}),
    "KTALoss": ({"knowledge_translator_path": "2", "feature_adapter_path": "a"}, {"a": {**HEAD, "width": 5}}),
    "LogitStdKDLoss": ({"temperature": 2.0, "alpha": 0.5}, {}),
    "PADL2Loss": (
        {"student_embed_module_path": ".", "teacher_embed_module_path": ".", "module_path": "var"},
        {"var": {"path": ".", "width": 4}},
    ),
    "PKTLoss": ({}, {}),
    "RKDLoss": ({"dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"}, {}),
    "RegularizationLoss": ({"module_path": ".", "p": 2}, {}),
    "SKDDirectionLoss": ({}, {}),
    "SKDInstanceLoss": ({}, {}),
    "SPKDLoss": ({"reduction": "batchmean"}, {}),
    "SRDLoss": (
        {**FEATURES, **dict.fromkeys(("student_linear_module_path", "teacher_linear_module_path"), ".")},
        {},
    ),
    "SSKDLoss": (
        {
            "student_ss_module_path": "s",
            "teacher_ss_module_path": "t",
            "kl_temp": 4.0,
            "ss_temp": 0.5,
            "tf_temp": 4.0,
            "ss_ratio": 0.75,
            "tf_ratio": 1.0,
        },
        {"s": {"path": ".", "width": 6}, "t": {"path": ".", "width": 6, "role": "teacher"}},
    ),
    "VIDLoss": (
        {
            "feature_pairs": {
                "one": {"student": {"io": "output", "path": "mean"}, "teacher": DEEP, "weight": 1}
            }
        },
        {"mean": {"path": "2", "width": 5, "kind": "gaussian"}},
    ),
    "WeightedSumLoss": ({"sub_terms": {"kd": KD}}, {}),
}


def net(deep: int, seed: int) -> nn.Sequential:
    """Inputs ``(B, 2, 8, 8)`` to four classes; '0' has four channels, '2' has ``deep``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, deep, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(deep, 4),
        )


def images() -> Splits:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(32, 2, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)]
    return Splits(train=TensorSplit(*made))


def test_the_table_holds_every_loss_that_there_is():
    assert LOSSES.keys() == {*registry.MIDDLE_LEVEL_LOSS_DICT, *registry.HIGH_LEVEL_LOSS_DICT}


@pytest.mark.parametrize("name", LOSSES)
def test_it_trains(name):
    arguments, heads = LOSSES[name]
    deep = 3 if name != "FSPLoss" else 5  # the matrices that FSP compares have the layers' widths
    every = 4 if name == "SSKDLoss" else 1  # an image, three changes of it, one label
    loop = toys.loop(
        {"name": "torchdistill", "loss": name, "arguments": arguments, "heads": heads, "labels_every": every},
        student=net(deep, 1),
        teacher=net(5, 2),
        data=images(),
        steps=3,
    )
    # AuxSSKDLoss prepares a head of the teacher's for SSKDLoss; all others train the student.
    trained = loop.step.run.models["torchdistill.ss" if name == "AuxSSKDLoss" else "student"]
    before = toys.weights(trained)
    loop.run()
    assert not toys.same_bits(before, trained)
    for head in heads:
        assert f"torchdistill.{head}" in loop.state_dict()["models"]
