"""One update, one stage, one run of the loop."""
