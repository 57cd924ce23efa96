"""`safety-lens convert`: a model as a folder of safetensors."""

from pathlib import Path
from typing import Annotated

import typer

from safety_lens.cli import options, terminal


def convert(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="GGUF file (FILE.gguf, FOLDER:FILE.gguf, HUB_ID:FILE.gguf) or adapter."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist or must be empty.")],
    dtype: options.Dtype = None,
) -> None:
    """Dequantise a GGUF file, or merge an adapter, into a folder that loads in a few seconds.

    Weights are float32 unless --dtype asks for less.
    """
    terminal.quiet_libraries()
    from safety_lens.models import save_model

    save_model(model, out, dtype=dtype)
    terminal.out.print(f"written: {out}", markup=False, soft_wrap=True)
