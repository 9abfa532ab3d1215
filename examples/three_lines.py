"""Distil in three lines: models and data of your own, SLD with its defaults.

python examples/three_lines.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import stillhouse

images, classes = load_digits(return_X_y=True)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
x = torch.tensor(images, dtype=torch.float32)[order] / 16
y = torch.tensor(classes)[order]
data = {
    "train": (x[:300], y[:300]),
    "unlabelled": x[300:1100],
    "validation": (x[1100:1400], y[1100:1400]),
    "test": (x[1400:], y[1400:]),
}

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

# A teacher comes trained, usually; here the same call trains one.
stillhouse.distill(teacher, None, data, method="hard_labels", steps=500)

result = stillhouse.distill(student, teacher, data, method="sld", steps=2000, optimizer={"lr": 4e-3})
print(result.scores)
