"""A LightningModule of your own."""

import lightning as L
import torch
from small import rows, student, teacher
from torch.utils.data import DataLoader

import stillhouse
from stillhouse.adapters.lightning import Distilling


class Module(Distilling, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.student = student
        self.distil(student, stillhouse.Distillation("kd", teacher=teacher, task="causal_lm"))

    def training_step(self, batch, batch_idx):
        return self.distilled(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.step.parameter_groups(), lr=1e-3)


loader = DataLoader(rows(), batch_size=8, shuffle=True)
L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(Module(), loader)
