"""Plugins: found, loaded, checked, called."""
