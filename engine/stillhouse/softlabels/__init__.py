"""Soft labels: a teacher's answers, kept by sample id and bound to what made them."""

from stillhouse.softlabels.forms import Form, Labels
from stillhouse.softlabels.store import HeldLabels, SoftLabels, StoredLabels, write_soft_labels

__all__ = ["Form", "HeldLabels", "Labels", "SoftLabels", "StoredLabels", "write_soft_labels"]
