"""The contract between the engine and every plugin: hooks, what flows through them, who is told what."""
