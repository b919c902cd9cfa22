"""Post-hoc exponential moving averages of checkpoints."""
