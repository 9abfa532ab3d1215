"""One of several processes: trains in a trainer on its share of the batches, and writes what came out.

python two_processes.py TRAINER METHOD OUT, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import five
import torch
from test_five_trainers import METHODS

UPDATES, ACCUMULATE = 4, 2


def main(trainer: str, method: str, out: str) -> None:
    # Trainer and Accelerate deal whole batches out in turn, so that an update has the rows that it has in one process.
    case = five.Case(METHODS[method], UPDATES, ACCUMULATE, Path(out), world=int(os.environ["WORLD_SIZE"]))
    made = five.TRAINERS[trainer](case)
    evaluated = {}
    if (
        trainer == "hf"
    ):  # ten rows, three a rank: the last batch of each is filled up with rows that were there
        made.args.per_device_eval_batch_size = 3
        evaluated = made.evaluate(five.texts(10, seed=3))
    weights = torch.cat([p.detach().flatten() for p in case.student.parameters()])
    found = {"weights": weights, "losses": case.losses.found, "evaluated": evaluated}
    torch.save(found, Path(out) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
