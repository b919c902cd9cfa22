"""Braid: musubi-tuner's advanced training, and more, inside ComfyUI graphs."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI. The import waits until here so that tests need no ComfyUI."""
    from .nodes import BraidExtension

    return BraidExtension()
