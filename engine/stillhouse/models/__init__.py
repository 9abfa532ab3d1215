"""Calling other people's models: outputs, features, integrity."""
