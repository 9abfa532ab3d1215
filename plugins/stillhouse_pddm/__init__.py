"""PDDM: distillation along a path of small networks whose parameters PDNet learns to continue."""

from stillhouse_pddm.method import PDDM, PDDMConfig
from stillhouse_pddm.pdnet import PDNet

__all__ = ["PDDM", "PDDMConfig", "PDNet"]
