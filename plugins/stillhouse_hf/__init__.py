"""Tasks over a user's own files, and models of transformers from local checkpoints: the extra ``hf``."""
