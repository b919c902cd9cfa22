"""The optimizer of a run: which classes may be named, what they are built of, a rehearsal."""
