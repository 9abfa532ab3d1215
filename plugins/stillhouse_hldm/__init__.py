"""HLDM: a fused loss of several terms whose weights are learned."""

from stillhouse_hldm.method import HLDM, HLDMConfig

__all__ = ["HLDM", "HLDMConfig"]
