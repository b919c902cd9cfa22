"""Any ComfyUI MODEL made differentiable for the length of a session, exactly and without a copy."""
