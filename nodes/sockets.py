"""Braid's own socket types, each one frozen dataclass of the engine, and the menu categories."""

from comfy_api.latest import io

Network = io.Custom("BRAID_NETWORK")  # engine.network.spec.NetworkSpec
Timesteps = io.Custom("BRAID_TIMESTEPS")  # engine.timesteps.sampling.TimestepSampling
Optimizer = io.Custom("BRAID_OPTIMIZER")  # engine.training.optimizers.optimizer.OptimizerSpec
TrainingOptions = io.Custom("BRAID_TRAINING_OPTIONS")  # engine.training.options.TrainingOptions
Checkpoints = io.Custom("BRAID_CHECKPOINTS")  # engine.checkpoints.Checkpoints
MagCachePlan = io.Custom("BRAID_MAGCACHE")  # engine.magcache.plan.MagCachePlan
Calibrator = io.Custom("BRAID_CALIBRATOR")  # engine.comfyui.magcache.calibrate.Calibrator

NETWORK = "Braid/network"
TIMESTEPS = "Braid/timesteps"
TRAINING = "Braid/training"
EMA = "Braid/ema"
FP8 = "Braid/fp8"
MAGCACHE = "Braid/magcache"
PLAYGROUND = "Braid/playground"
