"""The rooms: imports go one way, everything imports, and help needs no torch."""

import ast
import importlib
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import safety_lens

ROOT = Path(safety_lens.__file__).parent
ROOMS = ["core", "probes", "interventions", "monitors", "cli"]
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "safety_lens."))
HEAVY = ["torch", "transformers", "transformer_lens", "sklearn", "scipy", "matplotlib", "datasets", "peft"]


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in (*ROOMS, "report") else "core"


def path_of(module: str) -> Path:
    place = ROOT.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def imports(module: str, *, everywhere: bool) -> set[str]:
    """Modules of ours that a file imports when it is loaded, or also inside functions and for type checks."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if everywhere else list(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in MODULES}


def allowed(importer: str, imported: str) -> bool:
    here, there = room(importer), room(imported)
    if here == "report":
        return there in ("core", "probes", "report")
    if there == "report":
        return here == "cli"
    return ROOMS.index(there) <= ROOMS.index(here)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_walk_finds_the_package() -> None:
    assert {"safety_lens.stats", "safety_lens.probes.extract", "safety_lens.cli.extract"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    wrong = [name for name in imports(module, everywhere=True) if not allowed(module, name)]
    assert not wrong, f"{module} ({room(module)}) imports {wrong}"


def test_the_rule_would_catch_a_wrong_import() -> None:
    assert not allowed("safety_lens.stats", "safety_lens.probes.extract")
    assert not allowed("safety_lens.probes.extract", "safety_lens.interventions.edits")
    assert not allowed("safety_lens.probes.extract", "safety_lens.report.plots")
    assert not allowed("safety_lens.report.plots", "safety_lens.cli.extract")
    assert allowed("safety_lens.cli.extract", "safety_lens.report.plots")


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


@pytest.mark.parametrize("module", ["safety_lens", "safety_lens.cli", "safety_lens.errors", "safety_lens.organism"])
def test_importing_the_package_or_its_command_line_loads_nothing_heavy(module: str) -> None:
    loaded = python(f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded == "[]"


def test_the_check_for_heavy_modules_would_see_one() -> None:
    assert "scipy" in python(f"import sys, safety_lens.stats; print([m for m in {HEAVY!r} if m in sys.modules])")


def test_help_of_every_verb_loads_nothing_heavy_and_starts_quickly() -> None:
    code = """
import sys
from safety_lens.cli import app
for verb in [[], ["extract"], ["pairs"], ["doctor"], ["demo"]]:
    try:
        app([*verb, "--help"])
    except SystemExit as done:
        assert done.code == 0, verb
print("HEAVY", [m for m in {heavy!r} if m in sys.modules])
"""
    out = python(code.format(heavy=HEAVY))
    assert out.endswith("HEAVY []")
    assert "--min-auroc" in out


@pytest.mark.slow
def test_help_takes_at_most_six_tenths_of_a_second() -> None:
    command = [sys.executable, "-c", "from safety_lens.cli import main; main()", "--help"]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) <= 0.6
