"""Soft labels: a model's outputs on a split, kept by sample id and bound to what made them."""

from stillhouse.softlabels.store import SoftLabels, write_soft_labels

__all__ = ["SoftLabels", "write_soft_labels"]
