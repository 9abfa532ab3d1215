"""A loop of your own."""

import torch
from small import rows, student
from torch.utils.data import DataLoader

loader = DataLoader(rows(), batch_size=8, shuffle=True)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
for batch in loader:
    loss = student(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f}")
