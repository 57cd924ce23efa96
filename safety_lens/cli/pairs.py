"""`safety-lens pairs`: build, convert and validate contrast pairs."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from safety_lens.data.validate import Finding

app = typer.Typer(help="Build, convert and validate contrast pairs.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", help="JSONL file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]
Seed = Annotated[int, typer.Option("--seed", help="Decides pairing, drawing and splits.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
def build(
    concept: Annotated[str, typer.Argument(help="refusal, sycophancy, deception or toxicity.")],
    out: Out,
    source: Annotated[str | None, typer.Option("--source", help="Named source (see `pairs sources`).")] = None,
    files: Annotated[
        list[str] | None, typer.Option("--from", help="Local copy of the source's input; once for each input.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Pairs to draw; default: all.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build contrast pairs from a named public source or a local copy of it."""
    from safety_lens.data.build import build_pairs
    from safety_lens.data.write import refuse_taken, write_rows

    refuse_taken(out, overwrite)  # before a download, not after
    built = build_pairs(concept, source=source, files=files or (), n=n, seed=seed)
    write_rows(out, built.rows, overwrite=overwrite)
    _written(out, built.rows, built.notes, as_json)


@app.command()
def sources(as_json: Json = False) -> None:
    """List the sources that `build` knows."""
    from safety_lens.data.sources import SOURCES

    if as_json:
        rows = [{"concept": s.concept, "source": s.name, "inputs": s.inputs, "licence": s.licence} for s in SOURCES]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    from safety_lens.report.whole_words import WordTable

    table = WordTable("concept", "source", "inputs (--from, in this order)", "licence")
    for item in SOURCES:
        table.add_row(item.concept, item.name, "\n".join(item.inputs), item.licence)
    Console().print(table)


@app.command()
def convert(
    pairs: Annotated[str, typer.Argument(help="File, built-in concept or hf:name.")],
    to: Annotated[str, typer.Option("--to", help="arditi, caa, ab, statements or messages.")],
    out: Out,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write pairs in another format; pairs that it cannot express are an error."""
    from safety_lens.data.convert import convert as convert_pairs
    from safety_lens.data.write import write_rows

    converted = convert_pairs(pairs, to, seed=seed)
    write_rows(out, converted.rows, overwrite=overwrite)
    _written(out, converted.rows, (f"{converted.came_from} to {to}", *converted.notes), as_json)


@app.command()
def validate(
    pairs: Annotated[str, typer.Argument(help="File, built-in concept or hf:name.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", "--model", help="Render and count tokens for this tokenizer ('organism' or a folder)."
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=1, help="Token limit of the model.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Check pairs for what makes numbers wrong (errors, exit 3) or easy to misread (warnings, exit 0)."""
    from safety_lens.data.validate import validate as check

    loaded = None if tokenizer is None else _load_tokenizer(tokenizer)
    findings = check(pairs, tokenizer=loaded, max_length=max_length, seed=seed)
    levels = Counter(finding.level for finding in findings)
    if as_json:
        counts = {"errors": levels["error"], "warnings": levels["warning"]}
        typer.echo(
            json.dumps({"pairs": pairs, **counts, "findings": [f._asdict() for f in findings]}, ensure_ascii=False)
        )
    else:
        _show(pairs, findings)
    if levels["error"]:
        raise typer.Exit(3)


def _load_tokenizer(name: str) -> Any:
    from safety_lens.errors import ModelError
    from safety_lens.loading.hub import read_tokenizer, resolve

    found = read_tokenizer(name if Path(name).expanduser().is_dir() else resolve(name).base)  # also a tokenizer alone
    if found is None:
        raise ModelError(f"cannot load a tokenizer from {name}: it holds no tokenizer's files. Give a folder that does")
    return found


def _written(out: Path, rows: Sequence[dict[str, Any]], notes: Sequence[str], as_json: bool) -> None:
    names = ("train", "val", "test", "dev", None)
    splits = {name or "unsplit": sum(row.get("split") == name for row in rows) for name in names}
    splits = {name: count for name, count in splits.items() if count}
    if as_json:
        summary = {"out": str(out), "pairs": len(rows), "splits": splits, "notes": notes}
        typer.echo(json.dumps(summary, ensure_ascii=False))
        return
    counts = ", ".join(f"{count} {name}" for name, count in splits.items())
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{len(rows)} pairs[/bold] ({counts}) written to {out}")
    for note in notes:
        console.print(f"  {note}", markup=False)


def _show(pairs: str, findings: Sequence["Finding"]) -> None:
    from safety_lens.report.whole_words import WordTable

    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = WordTable("", "check", "n", "what was found", title=Text(pairs))
    for finding in findings:
        level = Text(finding.level, style=styles[finding.level])
        table.add_row(level, finding.check, str(finding.n), finding.message)
    Console().print(table)
