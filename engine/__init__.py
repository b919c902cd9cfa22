"""The work of Braid. Knows torch and safetensors; only `engine.comfyui` knows ComfyUI.

network     the trainable adapter: which layers, what maths, which file format
timesteps   which noise levels a run trains on, as one inverse CDF
training    the plan, the data, the loss and the loop of a run
ema         post-hoc averages of a run's checkpoints
fp8         weights held in FP8 with scales
magcache    which sampling steps may be skipped, planned over sigma
playground  a small real world (data, model, scores) that runs anywhere
comfyui     the adapter to the host

disk        files are read once they are checked, written whole or not at all

files, checkpoints, arguments, patterns, refusals, names, document, canvas  what several share

A feature never imports another one; `training` may use `network` and `timesteps`.
"""
