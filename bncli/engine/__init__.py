"""The loop over segments, and who works through it."""
