"""Which noise levels a run trains on."""
