"""Braid: musubi-tuner's advanced training, and more, inside ComfyUI graphs."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI; the import waits until here so that tests can import the package without ComfyUI."""
    from .nodes import BraidExtension

    return BraidExtension()
