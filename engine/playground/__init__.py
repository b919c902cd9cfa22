"""A small real world that runs anywhere: data, model, scores, demo."""
