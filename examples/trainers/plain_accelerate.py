"""Hugging Face Accelerate."""

import torch
from accelerate import Accelerator
from small import rows, student
from torch.utils.data import DataLoader

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
loader = DataLoader(rows(), batch_size=4, shuffle=True)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
for batch in loader:
    with accelerator.accumulate(student):
        loss = student(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
print(f"loss {loss.item():.3f}")
