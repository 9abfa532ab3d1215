"""A run: from a config or objects to a directory that explains itself."""
