"""Softmax divergences between a teacher and a student: one function, one specification, several backends.

``reference.py`` is the specification. Importing this package imports torch, and neither Numba nor CUDA: they come
with the first call that uses them.
"""

from stillhouse.kernels.backends import explain, warmup
from stillhouse.kernels.chunks import TeacherHead
from stillhouse.kernels.linear import linear_distillation_loss, linear_softmax_kl
from stillhouse.kernels.loss import Terms, distillation_loss, softmax_kl
from stillhouse.kernels.selfcheck import check
from stillhouse.kernels.targets import Sampled, Target, TopK

__all__ = [
    "Sampled",
    "Target",
    "TeacherHead",
    "Terms",
    "TopK",
    "check",
    "distillation_loss",
    "explain",
    "linear_distillation_loss",
    "linear_softmax_kl",
    "softmax_kl",
    "warmup",
]
