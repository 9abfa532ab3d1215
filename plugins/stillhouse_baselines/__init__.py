"""Published methods that comparison studies stand on."""
