"""Fixtures every test may use: offline, one thread per worker, the shared data folder when there is one."""

import os
from pathlib import Path

# Before torch or transformers is imported anywhere. One thread: the test models are tiny, and two workers with two
# threads each on two cores wait for one another ten times longer than they compute.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public data and models that the project never ships; tests that need it skip where it is unset."""
    folder = os.environ.get("SAFETY_LENS_SHARED")
    if not folder:
        pytest.skip("SAFETY_LENS_SHARED is unset: this test reads public data that the project does not ship")
    return Path(folder)


@pytest.fixture(autouse=True)
def _as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that an earlier test gave rich's consoles, and set back, would stand above COLUMNS from then on."""
    from safety_lens.cli import terminal

    for console in (terminal.out, terminal.err):
        monkeypatch.setattr(console, "_width", None)
