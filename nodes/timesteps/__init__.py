"""Which noise levels a run trains on, and the live picture of them."""
