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


def _real_model(name: str) -> Path:
    folder = os.environ.get("SAFETY_LENS_MODELS")
    if not folder:
        pytest.skip("SAFETY_LENS_MODELS is unset: `make test-real` sets it")
    if not (Path(folder) / name).is_file():
        pytest.skip(f"{folder} has no {name}: `make real` fetches it")
    return Path(folder) / name


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, for tests marked `real`."""
    return _real_model("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def qwencoder() -> Path:
    """The GGUF file of Qwen2.5-Coder-0.5B-Instruct, for tests marked `real_large`."""
    return _real_model("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


def _converted(file: Path, folder: Path) -> Path:
    from safety_lens.models import save_model

    return save_model(file, folder)


@pytest.fixture(scope="session")
def smollm2_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder of safetensors, which loads ten times as fast."""
    return _converted(smollm2, tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="session")
def qwencoder_folder(qwencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder of safetensors."""
    return _converted(qwencoder, tmp_path_factory.mktemp("real") / "qwencoder")


@pytest.fixture(autouse=True)
def _as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that an earlier test gave rich's consoles, and set back, would stand above COLUMNS from then on."""
    from safety_lens.cli import terminal

    for console in (terminal.out, terminal.err):
        monkeypatch.setattr(console, "_width", None)
