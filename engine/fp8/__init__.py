"""Weights held in FP8 with scales."""
