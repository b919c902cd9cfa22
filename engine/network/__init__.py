"""The trainable adapter: which layers it sits on, its maths, its files."""
