"""The adapter to ComfyUI: the only engine folder that imports `comfy`."""
