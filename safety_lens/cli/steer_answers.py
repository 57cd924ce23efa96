"""`safety-lens steer` without a sweep: both answers to every prompt, their scores, and where they are written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from safety_lens.cli import terminal
from safety_lens.cli.steer_prompts import Asked
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from safety_lens.interventions.scorers import Scorer
    from safety_lens.interventions.sweeping.plan import Decoding
    from safety_lens.log import Measurement
    from safety_lens.types import FwdHook

KIND, ANSWERS = "steering", "answers.jsonl"
SHOWN = 6
"""Prompts whose answers are printed next to scores, evenly spaced."""


class Place(NamedTuple):
    """Direction, site and coefficient of an edit, as measurement rows name them."""

    subject: str
    hook: str
    coeff: float


def check_stream(asked: Sequence[Asked], harmful: bool) -> None:
    """Refuse to stream several answers, or an answer to a harmful prompt.

    Raises:
        DataError: saying which.
    """
    if len(asked) != 1:
        raise DataError(f"--stream shows one answer as it is written: give a single prompt, not {len(asked)}")
    if harmful or asked[0].label == "harmful":
        raise DataError("--stream shows an answer whole, and one to a harmful prompt is not shown: leave out --stream")


def stream_answers(
    model: "HookedTransformer", asked: Asked, hooks: "Sequence[FwdHook]", decoding: "Decoding", seed: int
) -> None:
    """Print the answer without the edit, then the steered one as it is written."""
    from dataclasses import asdict

    from safety_lens.generation import generate
    from safety_lens.interventions.steering import applied

    settings: dict[str, Any] = {**asdict(decoding), "seed": seed}
    before = generate(model, [asked.prompt], **settings)[0].text
    terminal.out.print(f"without: {before}\nwith:    ", end="", markup=False, soft_wrap=True)
    with applied(model, hooks):
        generate(model, [asked.prompt], on_token=_printer(model), **settings)
    terminal.out.print()


def show_answers(
    model: "HookedTransformer",
    asked: Sequence[Asked],
    hooks: "Sequence[FwdHook]",
    decoding: "Decoding",
    scorers: "Sequence[Scorer]",
    place: Place,
    given: dict[str, Any],
) -> None:
    """Answer and score every prompt without and with the edit, print both, and write them to --out."""
    from safety_lens.interventions.answer_pairs import answer_pairs

    pairs = answer_pairs(
        model,
        [a.prompt for a in asked],
        hooks,
        scorers=scorers,
        labels=[a.label for a in asked],
        harmful=[given["harmful"] or a.label == "harmful" for a in asked],
        decoding=decoding,
        seed=given["seed"],
    )
    rows = pairs.rows(model.tokenizer)
    measured = pairs.measurements(place.subject, seed=given["seed"], hook=place.hook, coeff=place.coeff)
    if given["out"] is not None:
        _write(model, rows, measured, given)
    if given["as_json"]:
        numbers = [row.to_json() for row in measured] if scorers else []
        for line in [*(json.dumps(row, ensure_ascii=False) for row in rows), *numbers]:
            typer.echo(line)
        return
    shown = rows[:: -(-len(rows) // SHOWN)] if scorers else rows
    _side_by_side(shown)
    if len(shown) < len(rows):
        terminal.out.print(f"answers to {len(shown)} of {len(rows)} prompts shown: --json prints all, --out keeps all")
    if scorers:
        from safety_lens.report.steering_tables import change_table

        terminal.out.print(change_table(measured))
        for row in measured:
            if row.note is not None and row.metric.endswith("/change"):
                name = row.metric.removesuffix("/change")
                terminal.out.print(f"! {name}, {row.split}: {row.note}", markup=False, soft_wrap=True)
    if given["out"] is not None:
        terminal.out.print(f"written: {given['out']}", markup=False, soft_wrap=True)


def _write(
    model: "HookedTransformer", rows: Sequence[dict[str, Any]], measured: "Sequence[Measurement]", given: dict[str, Any]
) -> None:
    from safety_lens.artifacts import save_artifact

    def attach(folder: Path) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / ANSWERS).write_text("".join(lines), encoding="utf-8")

    save_artifact(
        given["out"],
        KIND,
        model=model,
        measurements=measured,
        arguments=given,
        attach=attach,
        overwrite=given["overwrite"],
    )


def _printer(model: "HookedTransformer") -> Callable[[int, int], None]:
    """Function that prints what each token adds to the text: single tokens may be parts of a character."""
    tokens: list[int] = []
    shown = ""

    def on_token(row: int, token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = "" if model.tokenizer is None else str(model.tokenizer.decode(tokens, skip_special_tokens=True))
        if not text.endswith("\ufffd"):
            terminal.out.print(text[len(shown) :], end="", markup=False, soft_wrap=True)
            shown = text

    return on_token


def _side_by_side(rows: Sequence[dict[str, Any]]) -> None:
    from safety_lens.interventions.answer_pairs import SIDES
    from safety_lens.interventions.kept_answers import WITHHELD
    from safety_lens.report.whole_words import WordTable

    table = WordTable("prompt", *SIDES, lines=True)
    for row in rows:
        table.add_row(row["prompt"], *(WITHHELD if row[side] is None else row[side] for side in SIDES))
    terminal.out.print(table)
