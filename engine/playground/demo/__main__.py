"""`make demo`: preview, train, average, quantise, cache, sample; ends with a report page."""

import argparse
import sys
import time
from pathlib import Path

from ..model import load_playground, read_record
from .averaging import averaging_section
from .caching import caching_section
from .quantising import quantising_section
from .report import write_report
from .training import noise_levels, train, training_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo_report"), help="folder of the report"
    )
    out = parser.parse_args().out
    started = time.perf_counter()
    model = load_playground()
    say("Noise levels …")
    sections = [noise_levels()]
    say("Training a LoRA …")
    trained = train(model, out / "loras")
    sections.append(training_section(model, trained))
    say("Averaging its checkpoints …")
    sections.append(averaging_section(model, trained))
    say("Quantising the model …")
    sections.append(quantising_section(model))
    say("Calibrating and planning the cache …")
    sections.append(caching_section(model))
    minutes = (time.perf_counter() - started) / 60
    lead = (
        f"Made by `make demo` in {minutes:.1f} minutes on this machine's CPU, with the small FLUX "
        f"that comes with Braid ({read_record()['steps']} steps of pretraining)."
    )
    page = write_report(out, "Braid: the demo", lead, sections)
    say(f"Done in {minutes:.1f} minutes. Open {page.resolve()}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
