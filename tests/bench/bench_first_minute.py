"""A newcomer's minute, and how fast charts answer, in a real server and browser.

From an empty ComfyUI to the first picture of a LoRA by clicking only what the screen offers:
Templates, this pack, the first workflow, Run. Then the time from a widget's new value to the chart
that shows it, and what ComfyUI says of the import of the pack. Seconds of this machine, not ratios:
there is nothing to compare them with side by side.

    python tests/bench/bench_first_minute.py
"""

import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host.browse import act, browsing  # noqa: E402
from host.serve import PACK_FOLDER, Server  # noqa: E402

PICTURED = """(title) => app.graph.nodes
  .some((node) => node.title === title && node.imgs?.some((image) => image.naturalWidth > 8))"""
DRAWN = "document.querySelector('.braid-live svg')?.outerHTML"
TURN = """async (value) => {
  const node = app.graph.nodes.find((each) => each.type === "BraidTimestepSampling");
  const panel = node.widgets.find((each) => each.name === "braid_live").element;
  const drawn = () => panel.querySelector("svg")?.outerHTML;
  const before = drawn();
  const started = performance.now();
  node.widgets.find((each) => each.name === "max_timestep").value = value;
  while (drawn() === before) await new Promise((next) => setTimeout(next, 1));
  return performance.now() - started;
}"""
TURNS = 30


def first_picture(page) -> tuple[float, float]:
    """Seconds of clicking until the run starts, and of the run until the picture is there."""
    started = time.perf_counter()
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_role("dialog").get_by_text(PACK_FOLDER, exact=True).click()
    page.get_by_role("dialog").get_by_text("01_train_a_lora").first.click()
    page.wait_for_function("app.graph.nodes.some((node) => node.type === 'BraidTrainLora')")
    page.get_by_role("button", name="Run", exact=True).first.click()
    queued = time.perf_counter()
    page.wait_for_function(PICTURED, arg="With the LoRA", timeout=600_000)
    return queued - started, time.perf_counter() - queued


def answers(page) -> list[float]:
    """Milliseconds from a new value to its chart, sorted."""
    act(page, "app.graph.clear()")
    act(page, "app.graph.add(LiteGraph.createNode('BraidTimestepSampling'))")
    page.wait_for_function(DRAWN)
    return sorted(page.evaluate(TURN, 990 - 10 * turn) for turn in range(TURNS))


def main() -> None:
    with Server.start() as server, browsing(server.url) as page:
        found = re.search(rf"([\d.]+) seconds: .*{re.escape(PACK_FOLDER)}", server.log())
        print(f"import of the pack: {found[1] if found else '?'} s, as ComfyUI says")
        page.wait_for_function("!document.querySelector('.p-blockui-mask')")
        clicks, run = first_picture(page)
        print(f"from Templates to Run: {clicks:.1f} s; from Run to the picture: {run:.1f} s")
        page.screenshot(path="/tmp/dbg/m3.png")
        ms = answers(page)
        print(
            f"live chart: median {statistics.median(ms):.0f} ms, 95th percentile "
            f"{ms[int(0.95 * TURNS)]:.0f} ms of {TURNS} changes"
        )


if __name__ == "__main__":
    main()
