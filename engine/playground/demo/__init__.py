"""The whole story in one command, without ComfyUI; the one place where all features meet."""
