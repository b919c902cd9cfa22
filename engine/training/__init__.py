"""The plan, the data, the loss and the loop of a training run."""
