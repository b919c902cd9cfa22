"""Nodes of other packs that ComfyUI may put ours in the place of, where the other is not there."""

from comfy_api.latest import ComfyAPI, io


def magcache() -> io.NodeReplace:
    """`MagCache` of ComfyUI-MagCache 1.6.1, whose import fails on today's ComfyUI.

    The rule is the same: threshold, retention and K mean what they meant there, `blocks` is what
    that pack remembered, `nearest` takes single entries of the list as it did (it rounded the
    index down). Not carried over:

    - `model_type`: ComfyUI copies values, it does not translate them. `auto` takes the same list
      for flux, chroma, hunyuan_video, hunyuan_video1.5 up to 20 steps, Wan 2.1 T2V, I2V 480p and
      VACE. For flux_kontext, qwen_image and Wan 2.1 I2V 720p it takes that of FLUX.1-dev, of 50
      steps and of 480p: choose "FLUX.1-Kontext-dev (ComfyUI pack, 20 steps)", "Qwen-Image
      (ComfyUI pack, 40 steps)" or "Wan2.1-I2V-14B-720P" in `preset`.
    - `start_step`, `end_step`: steps there, parts of the run here; the whole run is the default
      of both.
    - in the browser, the fields of `rule`: the front end does not fill those of a DynamicCombo,
      and they show MagCache's defaults. A prompt sent over the API gets all of them.
    """
    return io.NodeReplace(
        old_node_id="MagCache",
        new_node_id="BraidMagCache",
        old_widget_ids=[
            "model_type",
            "magcache_thresh",
            "retention_ratio",
            "magcache_K",
            "start_step",
            "end_step",
        ],
        input_mapping=[
            {"new_id": "model", "old_id": "model"},
            {"new_id": "preset", "set_value": "auto"},
            {"new_id": "mag_ratios", "set_value": "0"},
            {"new_id": "measure", "set_value": "blocks"},
            {"new_id": "rule", "set_value": "magcache"},
            {"new_id": "rule.threshold", "old_id": "magcache_thresh"},
            {"new_id": "rule.retention_ratio", "old_id": "retention_ratio"},
            {"new_id": "rule.k", "old_id": "magcache_K"},
            {"new_id": "rule.interpolation", "set_value": "nearest"},
        ],
        output_mapping=[{"old_idx": 0, "new_idx": 0}],
    )


async def register() -> None:
    """Tell a running ComfyUI of every replacement."""
    await ComfyAPI().node_replacement.register(magcache())
