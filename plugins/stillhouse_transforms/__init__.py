"""Changes of batches and targets that stand before any method, in config order."""

from stillhouse_transforms.inputs import Augment, Mixup
from stillhouse_transforms.labels import LabelCorrection, LabelSmoothing

__all__ = ["Augment", "LabelCorrection", "LabelSmoothing", "Mixup"]
