"""TensorBoard as an observer (extra ``tensorboard``)."""

from stillhouse_tensorboard.observer import TensorBoard

__all__ = ["TensorBoard"]
