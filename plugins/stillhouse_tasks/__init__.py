"""Tasks on real data that need no download."""
