"""Comparisons: methods by seeds, with intervals."""
