"""The adapter to ComfyUI: the only room of the engine that imports `comfy.*`.

model.py progress.py playground.py   what every room needs of the host
training/         one LoRA run, from what it is told to its saved files
differentiable/   any MODEL as something that can be differentiated, and left as it was
fp8/              loading, patching and saving models with scaled FP8 weights
magcache/         calibration and caching around the host's samplers
"""
