"""Keep your own loop, optimizer and device: add one object.

python examples/own_trainer.py
"""

import torch
from torch import nn

from stillhouse import DistillStep

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
student = nn.Linear(20, 5)
x = torch.randn(2048, 20)
y = teacher(x).argmax(-1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True)

step = DistillStep(
    {"name": "kd", "temperature": 2.0}, student=student, teacher=teacher, probe=next(iter(loader))
)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
for epoch in range(3):
    for batch in loader:
        loss, metrics = step(student, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    shown = {name: round(value.item(), 4) for name, value in metrics.items()}
    print(f"epoch {epoch}: {shown}")
step.close()
