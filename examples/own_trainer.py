"""Keep your own loop, optimizer and device: add one object.

python examples/own_trainer.py
"""

import torch
from torch import nn

import stillhouse

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
student = nn.Linear(20, 5)
x = torch.randn(2048, 20)
y = teacher(x).argmax(-1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True)

distillation = stillhouse.Distillation("kd", teacher=teacher, temperature=2.0)
with distillation.attach(student, probe=next(iter(loader)), steps=3 * len(loader)) as step:
    optimizer = torch.optim.AdamW(step.parameter_groups(), lr=1e-2)
    for epoch in range(3):
        for batch in loader:
            loss, metrics = step(student, batch)
            loss.backward()
            optimizer.step()
            step.zero_grad()
        shown = {name: round(value.item(), 4) for name, value in metrics.items()}
        print(f"epoch {epoch}: {shown}")
