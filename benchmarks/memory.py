"""Peak memory of verbs on a real model: (peak RSS - RSS after imports) / bytes of the loaded parameters.

Each verb runs through the command line's own function in a fresh process, after its modules are imported; then its
model is loaded a second time to count the bytes of its parameters, shared ones once.

Run: python benchmarks/memory.py --model MODEL [--only doctor]
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from figures import Report
from loading import Peak

MODULES = (
    *("cli", "conformance", "interventions.conformance", "interventions.causality.selector", "interventions.gguf"),
    *("models", "probes.extract", "probes.store", "report.causal_plots", "report.plots", "report.tables"),
)


class Case(NamedTuple):
    """A verb with its arguments; `limit` is what its peak may be, in bytes of the parameters."""

    arguments: Sequence[str]
    limit: float


CASES = {
    "doctor": Case(("doctor",), 1.6),
    "extract --select causal": Case(
        (
            *("extract", "--concept", "refusal", "--select", "causal", "--behaviour", "tokens:I"),
            *("--layers", "12,15,18", "--draws", "4"),
        ),
        1.5,
    ),
}


def measure(name: str, model: str) -> dict[str, float]:
    """Run one verb in this process: bytes of its peak above the imports, and of the parameters."""
    modules = [importlib.import_module(f"safety_lens.{module}") for module in MODULES]
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    with tempfile.TemporaryDirectory() as folder, Peak() as memory:
        out = ("--out", str(Path(folder) / "out")) if name != "doctor" else ()
        modules[0].app([*CASES[name].arguments, "--model", model, *out], standalone_mode=False)
    loaded = importlib.import_module("safety_lens.models").load_model(model, check=False)
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in loaded.parameters()}
    return {"peak": memory.top - memory.start, "parameters": sum(sizes.values()), "imports": memory.start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", choices=CASES, help="one verb instead of all")
    parser.add_argument("--of", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.of:
        print(json.dumps(measure(args.of, args.model)))
        return
    report = Report()
    for name in [args.only] if args.only else CASES:
        command = [sys.executable, __file__, "--model", args.model, "--of", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        report.add(f"{name}: peak above imports, GiB", found["peak"] / 2**30)
        report.add(f"{name}: parameters, GiB", found["parameters"] / 2**30)
        report.add(f"{name}: peak / parameters", found["peak"] / found["parameters"], CASES[name].limit, most=True)
    report.show()
    if args.out:
        args.out.write_text(json.dumps(report.rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
