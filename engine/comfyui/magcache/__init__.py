"""MagCache around the samplers of the host."""
