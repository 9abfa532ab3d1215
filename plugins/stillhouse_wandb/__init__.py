"""Weights & Biases as an observer (extra ``wandb``)."""

from stillhouse_wandb.observer import Wandb

__all__ = ["Wandb"]
