"""Everything the pack takes from ComfyUI is there and takes the arguments that we give it.

After an update of ComfyUI that breaks the pack, this says which symbol, and where it is used.
"""

import ast
from collections import defaultdict

import pytest
from host.symbols import bind, resolve, uses

USES = uses()
PLACES: dict[str, list] = defaultdict(list)
for use in USES:
    PLACES[use.symbol].append(use)


@pytest.mark.parametrize("symbol", PLACES)
def test_a_symbol_we_use_exists_and_takes_our_arguments(symbol):
    places = ", ".join(use.place for use in PLACES[symbol])
    try:
        target = resolve(symbol)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"this ComfyUI has no {symbol}, used at {places}: {error}")
    for use in PLACES[symbol]:
        if use.call is not None and target is not None:
            try:
                bind(target, use.call)
            except TypeError as error:
                pytest.fail(f"{symbol} no longer takes what {use.place} gives it: {error}")


def test_the_collector_sees_functions_methods_and_node_schemas():
    assert {
        "comfy.sd.load_diffusion_model",
        "comfy.model_patcher.ModelPatcher().add_wrapper_with_key",
        "comfy_api.latest.io.Schema",
        "comfy_api.latest.io.Int.Input",
        "folder_paths.get_output_directory",
        "server.PromptServer.instance.routes.post",
    } <= set(PLACES)


def test_a_missing_symbol_and_a_changed_signature_are_told():
    with pytest.raises(AttributeError):
        resolve("comfy.sd.load_diffusion_model_that_never_was")
    with pytest.raises(ImportError):
        resolve("comfy_that_never_was.sd")
    call = ast.parse("load_diffusion_model('x', colour='blue')", mode="eval").body
    with pytest.raises(TypeError, match="colour"):
        bind(resolve("comfy.sd.load_diffusion_model"), call)
