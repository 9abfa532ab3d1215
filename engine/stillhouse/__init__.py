"""Stillhouse: a plugin-based engine for knowledge distillation."""
