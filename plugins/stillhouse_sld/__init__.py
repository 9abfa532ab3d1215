"""SLD: soft label distillation with unlabelled data."""

from stillhouse_sld.method import SLD, SLDConfig

__all__ = ["SLD", "SLDConfig"]
