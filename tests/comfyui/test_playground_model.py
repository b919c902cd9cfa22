import comfy.sd
import pytest
import torch

from comfyui_braid.engine.playground.model import Flux


@pytest.mark.parametrize("seed", [0, 1])
def test_our_plain_flux_equals_comfyuis_flux_with_the_same_weights(seed):
    torch.manual_seed(seed)
    ours = Flux().eval()
    state = {
        name: value + 0.02 * torch.randn_like(value) for name, value in ours.state_dict().items()
    }
    ours.load_state_dict(state)
    patcher = comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in state.items()})
    x, t = torch.randn(3, 16, 16, 16), torch.rand(3)
    context, pooled = torch.randn(3, 4, 64), torch.randn(3, 32)
    with torch.inference_mode():
        theirs = patcher.model.diffusion_model(x, t, context, pooled)
        mine = ours(x, t, context, pooled)
    assert theirs.abs().mean() > 0.01
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
