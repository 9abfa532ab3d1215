"""A LightningModule of your own."""

import lightning as L
import torch
from small import rows, student
from torch.utils.data import DataLoader


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.student = student

    def training_step(self, batch, batch_idx):
        return self.student(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)


loader = DataLoader(rows(), batch_size=8, shuffle=True)
L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(Module(), loader)
