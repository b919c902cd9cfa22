"""What a run keeps on disk to be resumed from, and whether a state belongs to a run."""
