"""A graph made with ComfyUI-MagCache: offered for replacement, replaced, and run over the API."""

import pytest

OLD_GRAPH = {
    "last_node_id": 2,
    "last_link_id": 1,
    "nodes": [
        {
            "id": 1,
            "type": "BraidPlaygroundModel",
            "pos": [0, 0],
            "size": [300, 80],
            "outputs": [{"name": "model", "type": "MODEL", "links": [1]}],
        },
        {
            "id": 2,
            "type": "MagCache",
            "pos": [400, 0],
            "size": [300, 200],
            "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
            "outputs": [{"name": "model", "type": "MODEL", "links": []}],
            "properties": {"Node name for S&R": "MagCache"},
            "widgets_values": ["flux", 0.06, 0.15, 2, 0, -1],
        },
    ],
    "links": [[1, 1, 0, 2, 0, "MODEL"]],
    "version": 0.4,
}


def test_the_front_end_replaces_the_node_and_keeps_its_link(open_page, without_todays_front_end):
    without_todays_front_end("it offers no replacement of nodes")
    page = open_page({"Comfy.VueNodes.Enabled": False})
    page.evaluate("async (workflow) => { await app.loadGraphData(workflow); }", OLD_GRAPH)
    page.get_by_text("MagCache can be replaced").wait_for()
    page.get_by_role("button", name="View details").click()
    page.get_by_role("button", name="Replace").last.click()
    page.wait_for_function("app.graph.getNodeById(2)?.type === 'BraidMagCache'")
    inputs = page.evaluate("async () => (await app.graphToPrompt()).output['2'].inputs")
    assert inputs["model"] == ["1", 0]
    assert (inputs["preset"], inputs["measure"], inputs["rule"]) == ("auto", "blocks", "magcache")


def test_an_old_prompt_reaches_our_node_over_the_api(server):
    old = {"magcache_thresh": 0.06, "retention_ratio": 0.15, "magcache_K": 2}
    prompt = {
        "1": ("BraidPlaygroundModel", {}),
        "2": ("MagCache", {"model": ["1", 0], "model_type": "flux", **old}),
        "3": ("EmptySD3LatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "4": ("BraidMagCacheReport", {"model": ["2", 0], "latent": ["3", 0]}),
    }
    prompt = {n: {"class_type": k, "inputs": i, "_meta": {}} for n, (k, i) in prompt.items()}
    # The playground has no published list, which is the sentence of our node, not ComfyUI's.
    with pytest.raises(RuntimeError, match="there are no published ratios for this Flux model"):
        server.queue(prompt)
