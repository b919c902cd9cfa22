"""The fields that each mode of Timestep Sampling shows, with their tooltips."""

from comfy_api.latest import io


def _weighting(options: list[str]) -> io.Combo.Input:
    return io.Combo.Input(
        "weighting_scheme",
        options=options,
        default="none",
        tooltip="Weight of each sample's loss at its own noise level. none: 1. cosmap: up to 1.27 "
        "in the middle, 0.64 at both ends. sigma_sqrt: 1/t² (1 at pure noise, 1e6 near clean)."
        + (
            " logit_normal and mode do not weigh the loss: they choose the distribution."
            if "mode" in options
            else ""
        ),
    )


def _logit(name: str, default: float, low: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=low, max=20.0, step=0.05, round=0.001, tooltip=tooltip
    )


_SIGMA = [
    _weighting(["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"]),
    _logit(
        "logit_mean",
        0.0,
        -20.0,
        "Only for logit_normal: logit(t) has mean −logit_mean, so a positive value trains on LESS "
        "noise, as in musubi-tuner. 0 is centred.",
    ),
    _logit("logit_std", 1.0, 0.01, "Only for logit_normal: standard deviation of logit(t)."),
    io.Float.Input(
        "mode_scale",
        default=1.29,
        min=-1.0,
        max=1.75,
        step=0.01,
        tooltip="Only for mode: above 0 favours the middle, below 0 the two ends. −1 to 1.75.",
    ),
]
_WEIGHT = _weighting(["none", "cosmap", "sigma_sqrt"])
_SCALE = io.Float.Input(
    "sigmoid_scale",
    default=1.0,
    min=0.01,
    max=20.0,
    step=0.05,
    round=0.001,
    tooltip="Standard deviation of logit(t). 1 is a bell; 1.8 is almost flat; larger favours both "
    "ends.",
)
_SHIFT = io.Float.Input(
    "discrete_flow_shift",
    default=3.0,
    min=0.01,
    max=100.0,
    step=0.1,
    round=0.001,
    tooltip="Above 1 moves training to more noise: the median of t is shift / (1 + shift). "
    "No unit.",
)
_LOGSNR = [
    _logit(
        "logit_mean",
        -6.0,
        -20.0,
        "Mean of the log-SNR 2 ln((1 − t) / t). Negative = more noise; the Style-Friendly paper "
        "recommends −6.",
    ),
    _logit(
        "logit_std",
        2.0,
        0.01,
        "Standard deviation of the log-SNR. The paper recommends 2 or 3.",
    ),
]


def _share(name: str, default: float, of: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=1.0,
        step=0.005,
        round=0.0001,
        tooltip=f"Share of the draws from {of}. The three shares are relative: they are divided by "
        "their sum. musubi-tuner's document says 0.8 / 0.075 / 0.125 for both hybrids.",
    )


_SHARES = [
    _share("mid_ratio", 0.8, "the resolution-shifted bell"),
    _share("logsnr_ratio", 0.075, "the log-SNR distribution (style, high noise)"),
    _share("logsnr2_ratio", 0.125, "the low-noise distribution, log-SNR ~ N(5.36, 1) (detail)"),
]
MODE_FIELDS: dict[str, list[io.Input]] = {
    "sigma": _SIGMA,
    "uniform": [_WEIGHT],
    "sigmoid": [_SCALE, _WEIGHT],
    "shift": [_SHIFT, _SCALE, _WEIGHT],
    "flux_shift": [_SCALE, _WEIGHT],
    "qwen_shift": [_SCALE, _WEIGHT],
    "flux2_shift": [_SCALE, _WEIGHT],
    "krea2_shift": [_SCALE, _WEIGHT],
    "ideogram4_shift": [_WEIGHT],
    "logsnr": [*_LOGSNR, _WEIGHT],
    "qinglong_flux": [*_LOGSNR, *_SHARES, _SCALE, _WEIGHT],
    "qinglong_qwen": [*_LOGSNR, *_SHARES, _SCALE, _WEIGHT],
}
"""Mode -> its own inputs, in menu order."""
