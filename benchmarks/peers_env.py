"""An environment of their own for the peers that `extract.py` is compared with: their pins conflict with ours.

repeng wants numpy < 2, steering-vectors wants transformers < 5. Run: python benchmarks/peers_env.py
"""

import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".bench-venv"
TORCH = "torch==2.13.0"  # first and by itself, so that the peers' open ranges cannot choose another build
PEERS = ["repeng==0.4.0", "steering-vectors==0.12.2", "transformers==4.57.6", "numpy==1.26.4", "safetensors"]


def interpreter() -> Path | None:
    """The environment's Python, or None where it has not been made (or was interrupted while it was made)."""
    python = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    return python if (FOLDER / "complete").exists() else None


def make() -> Path:
    """Make the environment where it is missing; the peers come from PyPI."""
    python = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if interpreter() is None:
        print(f"making {FOLDER} with {TORCH} {' '.join(PEERS)}", flush=True)
        venv.create(FOLDER, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, *PEERS], check=True)
        (FOLDER / "complete").touch()
    return python


if __name__ == "__main__":
    print(make())
