"""TCMD: task-conditioned distillation, from tasks to specialists to one combined network."""

from stillhouse_tcmd.method import TCMD, TCMDConfig
from stillhouse_tcmd.networks import CombinedNetwork, Router, SeveralTeachers, Specialist

__all__ = ["TCMD", "CombinedNetwork", "Router", "SeveralTeachers", "Specialist", "TCMDConfig"]
