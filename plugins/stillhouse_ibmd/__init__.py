"""IBMD: distillation through an information bottleneck shared by teacher and student."""

from stillhouse_ibmd.bottleneck import Encoder, Gaussian, GaussianDecoder, divergence, rate
from stillhouse_ibmd.method import IBMD, IBMDConfig

__all__ = ["IBMD", "Encoder", "Gaussian", "GaussianDecoder", "IBMDConfig", "divergence", "rate"]
