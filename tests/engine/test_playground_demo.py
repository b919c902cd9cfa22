import dataclasses

from comfyui_braid.engine.playground.demo import __main__ as demo
from comfyui_braid.engine.playground.demo import averaging, caching, training


def test_the_demo_ends_with_a_report_whose_pictures_all_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(
        training, "PLAN", dataclasses.replace(training.PLAN, steps=10, batch_size=2)
    )
    monkeypatch.setattr(training, "SEEDS", (11,))
    monkeypatch.setattr(averaging, "HELD_OUT", 1)
    monkeypatch.setattr(caching, "STEPS", 12)
    monkeypatch.setattr(caching, "LETTERS", "AB")
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path)])
    demo.main()
    page = (tmp_path / "index.html").read_text()
    pictures = [part.split("'")[0] for part in page.split("<img src='")[1:]]
    assert len(pictures) >= 7
    assert all((tmp_path / name).stat().st_size > 1000 for name in pictures)
    assert page.count("<table>") == 4
    assert (tmp_path / "loras" / "outlined" / "outlined.safetensors").exists()
