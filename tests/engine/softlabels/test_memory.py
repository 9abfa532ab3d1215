"""Ten gibibytes, labelled and read in one."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, time
import torch
from torch import nn
from stillhouse.api import TensorSplit
from stillhouse.softlabels import Form
from stillhouse.softlabels.label import Recipe
from stillhouse.softlabels.places import place
from stillhouse.softlabels.writer import label_split

size, folder = float(sys.argv[1]) * 2**30, sys.argv[2]
torch.set_num_threads(1)
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, mapped pages too
V = 8192
split = TensorSplit(torch.arange(int(size / (4 * V)))[:, None].float())
teacher = nn.Linear(1, V)
before, start = most(), time.monotonic()
recipe = Recipe(Form.choose(V, "dense", "float32"), batch_size=512)
labels = label_split(place(folder), teacher, split, recipe)
print(f"labelled {len(labels)} samples in {time.monotonic() - start:.0f} s: +{most() - before:.2f} GiB", flush=True)
start = time.monotonic()
for ids in torch.randperm(len(labels)).split(256):
    rows = labels.lookup(ids)
print(f"read in {time.monotonic() - start:.0f} s: +{most() - before:.2f} GiB", flush=True)
with torch.no_grad():
    assert torch.allclose(rows, teacher(split.inputs[ids]), rtol=1e-5, atol=1e-5)
sys.exit(most() - before >= float(sys.argv[3]))
"""


def run(size: float, folder, most: float) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(size), str(folder), str(most)], capture_output=True, text=True
    )


@pytest.mark.slow
def test_one_gibibyte_is_labelled_and_read_in_six_tenths(tmp_path):
    done = run(1, tmp_path / "kept", 0.6)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_ten_gibibytes_are_labelled_and_read_in_less_than_one(tmp_path):
    if shutil.disk_usage(tmp_path).free < 12 * 2**30:
        pytest.skip("needs 12 GiB of disk")
    done = run(10, tmp_path / "kept", 1)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
