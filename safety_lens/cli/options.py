"""Options that every verb spells the same way."""

from collections.abc import Callable, Mapping
from inspect import signature
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from safety_lens.cli import terminal
from safety_lens.errors import DataError
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


Model = Annotated[
    str,
    typer.Option(
        callback=checked_model,
        help="Hub id, local folder of a model or adapter, or a GGUF file (FILE.gguf, FOLDER:FILE.gguf,"
        " HUB_ID:FILE.gguf); 'organism' is the small one shipped inside.",
    ),
]
Adapter = Annotated[str | None, typer.Option(help="Folder or hub id of a PEFT adapter to fold into the model.")]
Out = Annotated[Path, typer.Option(help="Folder to write; it must not exist, or --overwrite an artifact.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is already there.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes the first there is of cuda, mps, cpu.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default is what the checkpoint has.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]

Concepts = Annotated[
    list[str] | None,
    typer.Option(help="Built-in concept: refusal, sycophancy, deception, toxicity, hedging; repeat for several."),
]
Pairs = Annotated[list[str] | None, typer.Option(help="JSONL file of contrast pairs, or hf:NAME; repeatable.")]
Methods = Annotated[list[str] | None, typer.Option(help="dim, whitened, pca, logistic, robust; repeatable.")]
Point = Annotated[
    str, typer.Option(help="Hook point of each block: resid_pre/mid/post, attn_out, mlp_out, mlp_post, z.")
]
ReadPairs = Annotated[
    str | None,
    typer.Option("--read-pairs", help="Pairs of each concept that a measurement reads: TRAIN,TEST or all."),
]
ProbeHarmful = Annotated[
    Path | None,
    typer.Option("--probe-harmful", help="Harmful requests to read refusal on, as steer --prompts; default built-in."),
]
ProbeHarmless = Annotated[
    Path | None, typer.Option("--probe-harmless", help="Harmless requests to compare with; default built-in.")
]
Layers = Annotated[str | None, typer.Option(help="Blocks such as 0,3,8-12 or -1; default all.")]
ReadAt = Annotated[str, typer.Option(help="last, mean:K, mean:instruction, mean:answer, mean:all or answer_letter.")]
Select = Annotated[
    str,
    typer.Option(
        help="How the hook is chosen: separability, causal (what ablating and adding the direction does), or the name"
        " of a hook."
    ),
]
BehaviourName = Annotated[
    str | None,
    typer.Option(
        "--behaviour",
        help="With --select causal: refusal, agreement, falsehood, hedging, sides, tokens:I,Sorry, a file of openings,"
        " an artifact that stores a behaviour, or a scorer; default the concept's own.",
    ),
]
Draws = Annotated[
    int, typer.Option(min=0, help="With --select causal: random and shuffled directions, each, at the chosen hook.")
]
MaxKl = Annotated[
    float, typer.Option(min=0.0, help="With --select causal: nats per token by which ablating may change answers.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompts as plain text, without the chat template.")]
Truncate = Annotated[
    bool, typer.Option("--truncate", help="Cut user text that exceeds the context, never the template.")
]
Thinking = Annotated[
    bool | None, typer.Option("--enable-thinking/--no-thinking", help="Passed to chat templates that know it.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Prompts per forward; default by memory.")]


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
