"""Options that every verb spells the same way."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Hub id or local folder of a model or adapter; 'organism' is the small one shipped inside.")
]
Adapter = Annotated[str | None, typer.Option(help="Folder or hub id of a PEFT adapter to fold into the model.")]
Out = Annotated[Path, typer.Option(help="Folder to write; it must not exist, or --overwrite an artifact.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is already there.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes the first there is of cuda, mps, cpu.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default is what the checkpoint has.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
