"""Models with scaled FP8 weights inside the host."""
