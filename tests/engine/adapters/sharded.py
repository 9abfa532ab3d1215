"""One of several processes: a student and a teacher under fully_shard, in a loop of one's own, on unequal rows.

python sharded.py METHOD OUT, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import five
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stillhouse
from stillhouse.adapters import host

UPDATES, ROWS = 4, 8
METHODS = {"kd": "kd", "fitnets": ["kd", {"name": "fitnets", "layers": "uniform"}]}


def train(method: str, rank: int, world: int) -> tuple[torch.nn.Module, torch.nn.Module, list[float]]:
    """The student, what is trained beside it, and this rank's part of each update's loss."""
    student, teacher = five.gpt2(1), five.gpt2(2, layers=3, width=24)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for model in (student, teacher):
            for block in model.transformer.h:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
    data = five.texts(UPDATES * ROWS)
    distillation = stillhouse.Distillation(METHODS[method], teacher=teacher, task="causal_lm")
    reduce = host.sum_over_ranks if world > 1 else None
    losses = []
    with host.own_generators(42):
        step = distillation.attach(
            student, probe=five.padded(data[:4]), steps=UPDATES, reduce=reduce, divided_by=world
        )
    with step:
        optimizer = torch.optim.SGD(step.parameter_groups(), lr=0.1)
        for start in range(0, len(data), ROWS):
            rows = data[start : start + ROWS]
            part = rows if world == 1 else (rows[:5], rows[5:])[rank]
            output = step(student, five.padded(part))
            host.sum_when_differentiated(step, output.loss)
            output.loss.backward()
            optimizer.step()
            step.zero_grad()
            losses.append(float(output.metrics["loss"]))
        beside = torch.nn.ModuleList(step.run.models[name] for name in step.auxiliary)
    return student, beside, losses


def weights(model: torch.nn.Module) -> torch.Tensor:
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([torch.zeros(0), *(value.detach().flatten() for value in found)])


def main(method: str, out: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    student, beside, losses = train(method, rank, world)
    found = {"weights": torch.cat([weights(student), weights(beside)]), "losses": losses}
    found["held"] = sum(p.to_local().numel() for p in student.parameters())
    torch.save(found, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
