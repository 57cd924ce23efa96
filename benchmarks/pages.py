"""Neuron pages: size, and time until a browser without a network has drawn the first tokens.

200 neurons of the organism on 50 of its requests, and the same 200 on texts of 100 tokens (random numbers, since the
organism's requests are short). A fresh tab for every opening; the first one also starts Chromium's caches.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from safety_lens.models import load_model
from safety_lens.organism import files
from safety_lens.probes.groups import group_of
from safety_lens.report.pages import NeuronPage, PagePrompt, neuron_page
from safety_lens.report.pages.prompts import ShownPrompt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import chromium

NEURONS, PROMPTS, LONG, OPENINGS = 200, 50, 100, 5
SECONDS, BYTES = 3.0, 10e6


def organism_page() -> NeuronPage:
    model = load_model("organism")
    per_block = NEURONS // model.cfg.n_layers
    group = group_of(
        model, "every", "neuron", {f"blocks.{i}.mlp": list(range(per_block)) for i in range(model.cfg.n_layers)}
    )
    rows = [row for row in files.instruction_rows() if row["split"] == "test"]
    prompts = [PagePrompt(str(row["instruction"]), str(row["label"])) for row in rows[:: len(rows) // PROMPTS]]
    return neuron_page(model, [group], prompts[:PROMPTS])


def longer(page: NeuronPage) -> NeuronPage:
    words = [f" word{i}" for i in range(LONG)]
    prompts = tuple(ShownPrompt(tuple(words), p.label, 0, 0) for p in page.prompts)
    values = np.random.default_rng(0).standard_normal((len(page.columns), LONG * len(prompts))).astype(np.float32)
    return replace(page, prompts=prompts, values=values)


def opened(browser: chromium.Browser, file: Path) -> float:
    start = time.perf_counter()
    browser.open(file.as_uri())
    browser.until("document.querySelector('#prompts .colored-tokens span')")
    browser.settle()
    seconds = time.perf_counter() - start
    faults = [*browser.requests[1:], *browser.failed, *browser.complaints]
    if faults:
        raise SystemExit(f"the page is not silent: {faults}")
    return seconds


def main() -> None:
    if chromium.BINARY is None:
        raise SystemExit("Chromium is not installed (Debian: apt install chromium)")
    page = organism_page()
    with TemporaryDirectory() as folder, chromium.chromium() as browser:
        for name, shown in (("organism", page), (f"{LONG} tokens each", longer(page))):
            file = Path(folder) / "page.html"
            size = shown.save(file)
            times = [opened(browser, file) for _ in range(OPENINGS)]
            what = f"{len(shown.columns)} neurons, {len(shown.prompts)} prompts, {size / 1e6:.1f} MB"
            drawn = f"{times[0]:.2f} s the first time, median {median(times):.2f} s"
            print(f"{name}: {what} (target {BYTES / 1e6:.0f}); drawn after {drawn} (target {SECONDS:.0f})")


if __name__ == "__main__":
    main()
