"""Measurements: side by side in one run, medians of interleaved blocks."""
