"""The documentation tells the truth: its blocks run, its outputs are what is printed, its names exist.

A ```text block that follows a ```python or ```bash block is that block's output. Numbers may differ in the last
digits from machine to machine, words may not. After a change that is meant: `python tests/test_docs.py` writes the
outputs anew (all pages, or those named), and the diff shows what changed.
"""

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "interactive.ipynb"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
SLOW = {"guides/interactive.md", "guides/steering.md", "guides/suppression.md"}  # notebook, demo and tests run the same
WIDTH = 100  # of tables in the pages
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]+?) -->\n+)?"
    r"^```(?P<language>python|bash)[^\n]*\n(?P<body>.*?)^```$"
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One block of a page. mark: the comment before it. output: the text block behind it, None where there is none."""

    language: str
    mark: str
    body: str
    output: str | None
    line: int

    @property
    def runs(self) -> bool:
        return not self.mark.startswith("not run")

    @property
    def expected_exit(self) -> int:
        return int(self.mark.removeprefix("exits ")) if self.mark.startswith("exits ") else 0


def blocks_of(text: str) -> list[Block]:
    return [
        Block(m["language"], m["mark"] or "", m["body"], m["output"], text.count("\n", 0, m.start("language")) + 1)
        for m in BLOCK.finditer(text)
    ]


def run_command(line: str, expected_exit: int) -> str:
    """What a `safety-lens` line prints, run in this process; its error message too where it should fail."""
    from safety_lens.cli import main, terminal

    said, complained = io.StringIO(), io.StringIO()
    argv, width = sys.argv, terminal.out._width  # rich's property reads the terminal; setting it back would fix it
    sys.argv, terminal.out.width = shlex.split(line), WIDTH
    code = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv, terminal.out._width = argv, width
    assert code == expected_exit, f"{line}: exit code {code}, expected {expected_exit}\n{complained.getvalue()}"
    return said.getvalue() + (complained.getvalue() if expected_exit else "")


def run_block(block: Block, page: str, names: dict[str, Any]) -> str:
    if block.language == "bash":
        lines = block.body.replace("\\\n", " ").splitlines()
        return "".join(run_command(line, block.expected_exit) for line in lines if line.strip())
    said = io.StringIO()
    source = "\n" * block.line + block.body  # tracebacks then name the line of the page
    with contextlib.redirect_stdout(said):
        exec(compile(source, str(DOCS / page), "exec"), names)
    return said.getvalue()


def run_page(page: str, folder: Path, judge: Callable[[Block, str], None]) -> None:
    """Run the blocks of a page from top to bottom, in one namespace and one folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder) if sys.version_info >= (3, 11) else _chdir(folder):
        for block in blocks_of((DOCS / page).read_text(encoding="utf-8")):
            if block.runs:
                judge(block, run_block(block, page, names))


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:  # contextlib.chdir came with Python 3.11
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def same(shown: str, printed: str) -> bool:
    """Equal words, and numbers that agree to 2 % or 0.02; white space and where a table wraps do not count."""

    def parts(text: str) -> tuple[str, list[float]]:
        words = NUMBER.sub("#", re.sub(r"[\s─━┃│┏┓┡┩└┘┬┴┼╇┳╈├┤]+", "", text))
        return words, [float(n.replace("−", "-")) for n in NUMBER.findall(text)]

    (words, numbers), (others, found) = parts(shown), parts(printed)
    close = (math.isclose(a, b, rel_tol=0.02, abs_tol=0.02) for a, b in zip(numbers, found, strict=False))
    return words == others and len(numbers) == len(found) and all(close)


def with_blocks() -> list[Any]:
    pages = [page for page in PAGES if any(b.runs for b in blocks_of((DOCS / page).read_text(encoding="utf-8")))]
    return [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in pages]


@pytest.mark.parametrize("page", with_blocks())
def test_every_block_of_a_page_runs_and_prints_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("SAFETY_LENS_CACHE", str(tmp_path / "cache"))

    def judge(block: Block, printed: str) -> None:
        if block.output is not None:
            assert same(block.output, printed), f"{page}, line {block.line}: the page shows\n{block.output}\n{printed}"

    run_page(page, tmp_path, judge)


def test_the_judge_of_outputs_tells_wrong_numbers_and_words_from_rounding() -> None:
    assert same("AUROC 0.98 [0.95, 1.00]\n", "AUROC  0.981 [0.951, 1.00]")
    assert not same("AUROC 0.98", "AUROC 0.93")
    assert not same("blocks.5.hook", "blocks.6.hook")
    assert not same("refused", "answered")
    assert not same("1 2", "1 2 3")


@pytest.mark.parametrize("page", PAGES)
def test_a_block_that_is_not_run_says_why(page: str) -> None:
    for block in blocks_of((DOCS / page).read_text(encoding="utf-8")):
        if not block.runs:
            assert re.fullmatch(r"not run: .{8,}", block.mark), (
                f"{page}, line {block.line}: {block.mark!r} is no reason"
            )
        elif block.language == "bash":
            lines = block.body.replace("\\\n", " ").splitlines()
            odd = [line for line in lines if line.strip() and not line.startswith("safety-lens ")]
            assert not odd, f"{page}, line {block.line}: mark the block 'not run: reason', or use safety-lens: {odd}"


def test_the_essential_pages_run_blocks_and_each_guide_says_what_it_does_not_show() -> None:
    running = {param.values[0] for param in with_blocks()}
    guides = {f"guides/{name}.md" for name in ("extraction", "pairs", "interactive", "steering", "suppression")}
    assert {"quickstart.md"} | guides <= running
    for page in ("index.md", "quickstart.md", *(p for p in PAGES if p.startswith("guides/"))):
        assert re.search(r"^#+ What this does not show$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE), page


def test_every_name_of_the_package_that_the_pages_mention_exists() -> None:
    found = 0
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for dotted in set(re.findall(r"(?:`|::: )(safety_lens(?:\.\w+)+)", text)):
            assert resolves(dotted), f"{page} mentions {dotted}, which does not exist"
            found += 1
    assert found > 60


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            thing: Any = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for name in parts[n:]:
            if not (hasattr(thing, name) or name in getattr(thing, "__dataclass_fields__", {})):
                return False
            thing = getattr(thing, name, None)
        return True
    return False


ROOMS = [
    *("safety_lens", "safety_lens.probes", "safety_lens.data", "safety_lens.interventions", "safety_lens.monitors"),
    *("safety_lens.interventions.scorers", "safety_lens.interventions.suppression"),
]


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_in_the_reference(room: str) -> None:
    reference = "\n".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES if page.startswith("reference/"))
    listed = set(re.findall(r"::: safety_lens\S*\.(\w+)", reference))
    assert set(import_module(room).__all__) <= listed


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield path, command


def test_every_option_of_every_verb_is_in_the_command_line_reference() -> None:
    from typer.main import get_command

    from safety_lens.cli import app

    text = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    verbs = list(commands(get_command(app)))
    assert len(verbs) >= 7
    for path, command in verbs:
        section = sections[path[0]]
        if len(path) > 1:
            section = next(line for line in section.splitlines() if line.startswith(f"| `{' '.join(path)}"))
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if option.startswith("--"):
                    assert re.search(rf"`{option}\b", section), f"{' '.join(path)}: {option} is not documented"


def test_the_extraction_guide_explains_every_field_of_the_evidence_and_every_method() -> None:
    from safety_lens.probes import Evidence
    from safety_lens.probes.estimators import METHODS

    guide = (DOCS / "guides" / "extraction.md").read_text(encoding="utf-8")
    missing = [name for name in (*(f.name for f in fields(Evidence)), *METHODS) if f"`{name}`" not in guide]
    assert not missing


def test_the_guide_to_pairs_lists_every_format_and_every_check() -> None:
    from safety_lens.data.formats import FORMATS
    from safety_lens.data.validate import CHECKS

    guide = (DOCS / "guides" / "pairs.md").read_text(encoding="utf-8")
    for form in FORMATS:
        row = next((line for line in guide.splitlines() if line.startswith(f"| `{form.name}`")), "")
        assert all(f"`{name}`" in row for name in form.required), f"format {form.name} is not listed with its fields"
    for check in CHECKS:
        assert f"| {check.__name__.replace('_', ' ')} |" in guide, f"check {check.__name__} is not listed"


def test_the_site_builds_without_a_warning_and_loads_nothing_from_another_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]  # --quiet would hide warnings from --strict
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', html)
        loaded += re.findall(r'<link[^>]+rel="?(?:stylesheet|preload|preconnect|icon)[^>]*href="([^"]+)"', html)
        assert not [url for url in loaded if re.match(r"(?:https?:)?//", url)], page.name


def test_the_notebook_is_stored_without_outputs_and_each_step_is_summed_up() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert all(after == "markdown" for kind, after in pairwise(kinds) if kind == "code")
    assert kinds[-1] == "markdown"


def executed_notebook(folder: Path) -> Any:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Jupyter's own event loop
def test_the_notebook_runs_from_top_to_bottom_and_its_pages_need_no_network(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = executed_notebook(tmp_path)
    shown = [
        output.data["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result") and "text/html" in output.data
    ]
    assert shown, "the notebook shows no coloured tokens"
    for page in shown:
        assert "CircuitsVis.render" in page
        assert not re.search(r"""(?:src|href)\s*=\s*["']https?:|import .* from ["']https?:""", page)


def refresh(pages: list[str]) -> None:
    """Write the outputs of these pages anew."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": str(WIDTH)}
    for page in pages:
        printed: dict[int, str] = {}
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
            os.environ["SAFETY_LENS_CACHE"] = cache
            run_page(page, Path(folder), lambda block, text, into=printed: into.update({block.line: text}))
        text = (DOCS / page).read_text(encoding="utf-8")

        def new(m: re.Match[str], text: str = text, printed: dict[int, str] = printed) -> str:
            line = text.count("\n", 0, m.start("language")) + 1
            if m["output"] is None or line not in printed:
                return m[0]
            tidy = "".join(row.rstrip() + "\n" for row in printed[line].strip("\n").splitlines())
            return m[0][: m.start("output") - m.start()] + tidy + m[0][m.end("output") - m.start() :]

        (DOCS / page).write_text(BLOCK.sub(new, text), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    refresh(sys.argv[1:] or [param.values[0] for param in with_blocks()])
