"""Skipping a block stack through ComfyUI's block-replace hooks: `measure = blocks`, as the paper.

The hooks see every block of the `dit` stacks. On a computed call the hidden state before the first
block is cloned (blocks add to it in place) and the residual after the last one is taken; on a
skipped call every block hands its input on and the last one adds the residual. Replacements of
other nodes stay: they are called wherever a block is.
"""

from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

BlockKey = tuple[str, int]
Replace = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
STACKS = {
    "double_blocks": "double_block",
    "single_blocks": "single_block",
    "blocks": "double_block",
    "transformer_blocks": "double_block",
}
"""Module list of a diffusion model -> the name its hooks have, in the order they run."""
HOOKED_MODELS = frozenset(
    "Flux Flux2 Chroma HunyuanVideo HunyuanVideoI2V HunyuanVideo15 HunyuanImage21 QwenImage WAN21 "
    "WAN22 WAN21_Camera".split()
)
"""Models whose block loop was read and tried: hidden state in `img`, every block hooked, nothing
added between them. (VACE adds the hints of a second stack between the blocks, which runs in full
whatever is skipped.)"""


def block_keys(patcher: ModelPatcher) -> list[BlockKey]:
    """Keys of all hooked blocks in running order; ValueError where the model has no such hooks."""
    name = type(patcher.model).__name__
    if name not in HOOKED_MODELS:
        raise ValueError(
            f"measure 'blocks': {name} has no hooks around its block stack, or does more between "
            "the blocks than they see; use measure 'latent', which works for every model"
        )
    network = patcher.model.diffusion_model
    children = dict(network.named_children())
    stacks = [(children[attr], name) for attr, name in STACKS.items() if attr in children]
    return [
        (name, index)
        for stack, name in stacks
        if isinstance(stack, nn.ModuleList)
        for index in range(len(stack))
    ]


def measured_blocks(patcher: ModelPatcher, measure: str) -> list[BlockKey]:
    """The blocks whose residual is measured; none when it is the whole model's (`latent`)."""
    return block_keys(patcher) if measure == "blocks" else []


def with_hooks(options: dict[str, Any], hooks: dict[BlockKey, Replace]) -> dict[str, Any]:
    """A copy of `transformer_options` with `hooks` around the replacements already there."""
    replaced = dict(options.get("patches_replace", {}))
    present = dict(replaced.get("dit", {}))
    replaced["dit"] = {
        **present,
        **{key: _around(hook, present.get(key)) for key, hook in hooks.items()},
    }
    return {**options, "patches_replace": replaced}


def _around(hook: Replace, inner: Replace | None) -> Replace:
    if inner is None:
        return hook

    def both(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return hook(args, {**extra, "original_block": lambda inside: inner(inside, extra)})

    return both


class StackMeasure:
    """Hooks of a computed call; `residual` is there after it (B, L, D)."""

    def __init__(self, keys: list[BlockKey]) -> None:
        self._first, self._last = keys[0], keys[-1]
        self._before: Tensor | None = None
        self.residual: Tensor | None = None

    def hooks(self) -> dict[BlockKey, Replace]:
        """The hooks around the first and the last block."""
        if self._first == self._last:
            return {self._first: lambda args, extra: self._leave(self._enter(args), extra)}
        return {
            self._first: lambda args, extra: extra["original_block"](self._enter(args)),
            self._last: self._leave,
        }

    def _enter(self, args: dict[str, Any]) -> dict[str, Any]:
        self._before = args["img"].clone()
        return args

    def _leave(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        before, self._before = self._before, None
        assert before is not None, "the first block runs before the last"
        tokens = before.shape[1]
        self.residual = out["img"][:, -tokens:] - before  # single blocks: text comes first
        return out


def skipping_hooks(
    keys: list[BlockKey], residual_for: Callable[[Tensor], Tensor]
) -> dict[BlockKey, Replace]:
    """Hooks of a skipped call: no block runs, the last adds the residual to the image tokens.

    `residual_for` gives it for the hidden state before the first block (B, L, D).
    """
    tokens = 0

    def enter(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        nonlocal tokens
        tokens = args["img"].shape[1]
        return passed(args, extra)

    def passed(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return {"img": args["img"], **({"txt": args["txt"]} if "txt" in args else {})}

    def leave(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = passed(args, extra)
        hidden = out["img"]
        length = tokens or hidden.shape[1]
        image = hidden[:, -length:]
        summed = hidden.clone()
        summed[:, -length:] += residual_for(image)
        return {**out, "img": summed}

    hooks: dict[BlockKey, Replace] = dict.fromkeys(keys, passed)
    hooks[keys[0]] = enter
    hooks[keys[-1]] = leave
    return hooks
