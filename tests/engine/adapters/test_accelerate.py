"""Accelerate's own checkpoints resume a distillation exactly, with what is trained beside the student."""

from __future__ import annotations

import five
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

import stillhouse
from stillhouse.adapters.accelerate import attached

FITNETS = {"name": "fitnets", "layers": {"transformer.h.0.mlp": "transformer.h.1.mlp"}}


def train(folder, *, methods=(FITNETS, "kd"), register=True, seed=0, resume=False):
    """Two epochs of two updates, saved after the first; or the second alone."""
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    data = five.texts(16)
    distillation = stillhouse.Distillation(
        list(methods), teacher=five.gpt2(2, layers=3, width=24), task="causal_lm"
    )
    student = five.gpt2(1)
    made = attached(distillation, accelerator, student, probe=five.padded(data[:4]), steps=4, seed=seed)
    with made as step:
        optimizer = torch.optim.AdamW(step.parameter_groups(), lr=5e-3)
        loader = DataLoader(data, batch_size=4, collate_fn=five.padded)
        wrapped, optimizer, loader = accelerator.prepare(student, optimizer, loader)
        if register:
            accelerator.register_for_checkpointing(step)
        if resume:
            accelerator.load_state(folder)
            if not register:
                step.load_state(folder)
            assert step.step.schedule.at.step == 2
        for epoch in range(int(resume), 2):
            for batch in step.updates(loader):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(step(wrapped, batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            if epoch == 0:
                accelerator.save_state(folder)
                if not register:
                    step.save_state(folder)
        trained = [parameter.detach() for parameter in step.trained_parameters()]
    return torch.cat([parameter.flatten() for parameter in trained])


@pytest.mark.parametrize("register", [True, False])
def test_a_resume_is_exact(register, tmp_path):
    folder = str(tmp_path)
    whole = train(folder, register=register)
    assert torch.equal(train(folder, register=register, seed=1, resume=True), whole)
