"""Post-hoc EMA: averages of checkpoints, live and as a run has them."""
