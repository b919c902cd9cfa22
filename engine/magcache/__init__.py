"""Which sampling steps may be skipped, planned over sigma."""
