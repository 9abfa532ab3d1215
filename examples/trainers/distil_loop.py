"""A loop of your own."""

import torch
from small import rows, student, teacher
from torch.utils.data import DataLoader

import stillhouse

loader = DataLoader(rows(), batch_size=8, shuffle=True)
distillation = stillhouse.Distillation("kd", teacher=teacher, task="causal_lm")
step = distillation.attach(student, probe=next(iter(loader)), steps=len(loader))
optimizer = torch.optim.AdamW(step.parameter_groups(), lr=1e-3)
for batch in loader:
    loss = step(student, batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f}")
