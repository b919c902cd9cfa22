"""`make full-size`: real models with random weights, loaded, trained and sampled as users do."""
