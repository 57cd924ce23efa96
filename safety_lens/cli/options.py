"""Options that every verb spells the same way."""

from collections.abc import Callable, Mapping
from inspect import signature
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from safety_lens.artifacts import read_manifest
from safety_lens.cli import terminal
from safety_lens.errors import ArtifactError, DataError
from safety_lens.loading.gguf_files import names_gguf, read_header, resolve_gguf


def checked_model(source: str | None) -> str | None:
    """Check a GGUF file from its header, and report what loading it costs, before anything heavy is imported."""
    if source is not None and names_gguf(source):
        file = Path(resolve_gguf(source))
        if file.is_file():
            billions = sum(prod(t.shape) for t in read_header(file).tensors) / 1e9
            terminal.err.print(
                f"{source} is dequantised at every load (about {8 + 60 * billions:.0f} s of CPU time). Once for all:"
                f" safety-lens convert {source} --out FOLDER, then --model FOLDER",
                markup=False, soft_wrap=True,
            )  # fmt: skip
    return source


def checked_directions(path: Path | None) -> Path | None:
    """Refuse what holds no directions, from its manifest, before anything heavy is imported."""
    if path is not None and path.suffix != ".gguf":
        read_manifest(path, "directions")
    elif path is not None and not path.is_file():
        raise ArtifactError(f"no file {path}: give an artifact that `extract` wrote, or a GGUF control vector")
    return path


MODEL, READING, PROMPTS = "Model", "What is read", "How prompts are put to the model"
CHOICE, FIT, OUTPUT = "Choice of the hook", "Fit and test", "Output"
"""Panels of --help that options of several verbs stand in."""

Model = Annotated[
    str,
    typer.Option(
        callback=checked_model,
        help="Hub id, local folder of a model or adapter, or a GGUF file (FILE.gguf, FOLDER:FILE.gguf,"
        " HUB_ID:FILE.gguf); 'organism' is the small one shipped inside.",
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None, typer.Option(help="Folder or hub id of a PEFT adapter to fold into the model.", rich_help_panel=MODEL)
]
Out = Annotated[
    Path, typer.Option(help="Folder to write; it must not exist, or --overwrite an artifact.", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an artifact that is already there.", rich_help_panel=OUTPUT)
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.", rich_help_panel=FIT)]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, mps; auto takes the first there is of cuda, mps, cpu.", rich_help_panel=MODEL
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default is what the checkpoint has.", rich_help_panel=MODEL),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.", rich_help_panel=OUTPUT)]

Concepts = Annotated[
    list[str] | None,
    typer.Option(
        help="Built-in concept: refusal, sycophancy, deception, toxicity, hedging; repeat for several.",
        rich_help_panel=READING,
    ),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option(help="JSONL file of contrast pairs, or hf:NAME; repeatable.", rich_help_panel=READING),
]
Methods = Annotated[
    list[str] | None, typer.Option(help="dim, whitened, pca, logistic, robust; repeatable.", rich_help_panel=FIT)
]
Point = Annotated[
    str,
    typer.Option(
        help="Hook point of each block: resid_pre, resid_mid, resid_post, attn_out, mlp_out, mlp_post, z.",
        rich_help_panel=READING,
    ),
]
ReadPairs = Annotated[
    str | None,
    typer.Option(
        "--read-pairs",
        help="Pairs of each concept that a measurement reads: TRAIN,TEST or all.",
        rich_help_panel=READING,
    ),
]
BaselineFrom = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        help="Folder of a measurement before training that runs share: read where one is stored, else stored there.",
        rich_help_panel=READING,
    ),
]
ProbeHarmful = Annotated[
    Path | None,
    typer.Option(
        "--probe-harmful",
        help="Harmful requests to read refusal on, as steer --prompts; default built-in.",
        rich_help_panel=READING,
    ),
]
ProbeHarmless = Annotated[
    Path | None,
    typer.Option(
        "--probe-harmless", help="Harmless requests to compare with; default built-in.", rich_help_panel=READING
    ),
]
Layers = Annotated[
    str | None, typer.Option(help="Blocks such as 0,3,8-12 or -1; default all.", rich_help_panel=READING)
]
ReadAt = Annotated[
    str,
    typer.Option(
        help="last, mean:K, mean:instruction, mean:answer, mean:all or answer_letter.", rich_help_panel=READING
    ),
]
Select = Annotated[
    str,
    typer.Option(
        help="How the hook is chosen: separability, causal (what ablating and adding the direction does), or the name"
        " of a hook.",
        rich_help_panel=CHOICE,
    ),
]
BehaviourName = Annotated[
    str | None,
    typer.Option(
        "--behaviour",
        help="With --select causal: refusal, agreement, falsehood, hedging, sides, tokens:I,Sorry, a file of openings,"
        " an artifact that stores a behaviour, or a scorer; default the concept's own.",
        rich_help_panel=CHOICE,
    ),
]
Draws = Annotated[
    int,
    typer.Option(
        min=0,
        help="With --select causal: random and shuffled directions, each, at the chosen hook.",
        rich_help_panel=CHOICE,
    ),
]
MaxKl = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="With --select causal: nats per token by which ablating may change answers.",
        rich_help_panel=CHOICE,
    ),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Take prompts as plain text, without the chat template.", rich_help_panel=PROMPTS)
]
Truncate = Annotated[
    bool,
    typer.Option(
        "--truncate", help="Cut user text that exceeds the context, never the template.", rich_help_panel=PROMPTS
    ),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--enable-thinking/--no-thinking", help="Passed to chat templates that know it.", rich_help_panel=PROMPTS
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Prompts per forward; default by memory.", rich_help_panel=READING)
]


def parse_read_pairs(text: str) -> dict[str, int | None]:
    """Read `--read-pairs`: TRAIN,TEST as numbers, or all.

    Raises:
        DataError: anything else.
    """
    if text == "all":
        return {"train": None, "test": None}
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise DataError(f"--read-pairs {text!r}: give TRAIN,TEST such as 40,20, or all")
    return {"train": int(parts[0]), "test": int(parts[1])}


def changed(verb: Callable[..., None], given: Mapping[str, Any]) -> dict[str, str]:
    """Flags of a verb's options whose value is not the default, by name."""
    options = {name: p for name, p in signature(verb).parameters.items() if given[name] != p.default}
    spelt = {name: p.annotation.__metadata__[0].param_decls or () for name, p in options.items()}
    return {name: next(iter(flags), f"--{name.replace('_', '-')}") for name, flags in spelt.items()}
