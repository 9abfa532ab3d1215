"""Soft labels: a teacher's answers, kept by sample id and bound to what made them."""

from stillhouse.softlabels.base import SoftLabels
from stillhouse.softlabels.forms import Form, Labels
from stillhouse.softlabels.kept import HeldLabels, write_soft_labels
from stillhouse.softlabels.store import StoredLabels

__all__ = ["Form", "HeldLabels", "Labels", "SoftLabels", "StoredLabels", "write_soft_labels"]
