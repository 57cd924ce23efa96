"""Prompts from the command line and from files, with their labels and roles."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safety_lens.data.prompt_files import prompt_text, read_lines, system_text, with_system
from safety_lens.errors import DataError

if TYPE_CHECKING:
    from safety_lens.data.rows import Row
    from safety_lens.interventions.sweeping.plan import SweepPrompt
    from safety_lens.types import Prompt

CHALLENGING, BENIGN = 0.5, 0.25
"""Toxicity from which a prompt of RealToxicityPrompts is called challenging, and below which benign."""
SUBSETS = {"challenging": ("challenging",), "benign": ("benign",), "both": ("challenging", "benign")}


class Asked(NamedTuple):
    """One prompt. split: "train", "val", "test", None where the file does not say. system: its own system prompt."""

    text: str
    label: str | None = None
    split: str | None = None
    system: str | None = None

    @property
    def prompt(self) -> "Prompt":
        """The prompt as the model is given it: text alone, or a conversation that begins with the system prompt."""
        return with_system(self.text, self.system)


def read_prompts(
    texts: Sequence[str] | None, file: Path | None, subset: str | None = None, system: str | None = None
) -> list[Asked]:
    """Prompts of the command line, then those of a file: JSONL, CSV, or .txt with one a line.

    subset: only rows whose prompt toxicity (field toxicity, or prompt.toxicity as RealToxicityPrompts has it) says so,
    labelled by it. system: the system prompt of prompts that have none (rows may have a field system).

    Raises:
        DataError: no prompts, an empty one, or a file that cannot be read.
    """
    found = [Asked(text) for text in texts or []]
    if file is not None:
        found += _from_file(file, subset)
    elif subset is not None:
        raise DataError("--subset takes rows of --prompts FILE by their toxicity: give a file")
    if not found:
        raise DataError("nothing to say to the model: give a prompt, or a file with --prompts")
    if empty := [i for i, asked in enumerate(found) if not asked.text.strip()]:
        raise DataError(f"prompt {empty[0] + 1} is empty")
    return [asked if asked.system is not None else asked._replace(system=system) for asked in found]


def _from_file(file: Path, subset: str | None) -> list[Asked]:
    from safety_lens.data.rows import read_rows

    if subset is not None and subset not in SUBSETS:
        raise DataError(f"--subset {subset!r}: choose {', '.join(SUBSETS)}")
    if file.suffix.lower() == ".txt":
        if subset is not None:
            raise DataError(f"--subset needs rows with a toxicity; {file} is plain text")
        return [Asked(line) for line in read_lines(file)]
    rows = read_rows(file).rows
    if subset is None:
        return [_asked(row, row.label("label")) for row in rows]
    labelled = [(_toxicity(row), row) for row in rows]
    kinds = [("challenging" if t >= CHALLENGING else "benign" if t < BENIGN else "", row) for t, row in labelled]
    found = [_asked(row, kind) for kind, row in kinds if kind in SUBSETS[subset]]
    if not found:
        raise DataError(f"{file} has no {subset} prompts (toxicity >= {CHALLENGING} or < {BENIGN})")
    return found


def _asked(row: "Row", label: str | None) -> Asked:
    return Asked(prompt_text(row), label, row.split, system_text(row))


def _toxicity(row: "Row") -> float:
    inner = row.fields.get("prompt")
    value = inner.get("toxicity") if isinstance(inner, dict) else row.fields.get("toxicity")
    if value is None and isinstance(inner, dict):
        return float("nan")  # Perspective gave no score for some prompts: they belong to neither subset
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return row.number("toxicity")


def limited(asked: Sequence[Asked], limit: int | None, seed: int) -> list[Asked]:
    """At most `limit` prompts of each split and label, drawn at random, in their order."""
    if limit is None:
        return list(asked)
    rng, kept = random.Random(seed), set()
    for kind in dict.fromkeys((a.split, a.label) for a in asked):
        members = [i for i, a in enumerate(asked) if (a.split, a.label) == kind]
        kept |= set(rng.sample(members, min(limit, len(members))))
    return [a for i, a in enumerate(asked) if i in kept]


class Roles(NamedTuple):
    """Prompts of a sweep. remark: how they came by their roles, for the reader."""

    prompts: "list[SweepPrompt]"
    remark: str


def with_roles(asked: Sequence[Asked], share: float, seed: int, harmful: bool) -> Roles:
    """Selection and test prompts: by the file's splits (val, test) where it has them, else drawn within each label.

    A text that stands there twice is one prompt; prompts labelled "harmful" are marked so.

    Raises:
        DataError: no prompt is left to test on.
    """
    from safety_lens.interventions.sweeping.plan import SweepPrompt

    unique = list({" ".join(a.text.casefold().split()): a for a in reversed(asked)}.values())[::-1]
    own = any(a.split in ("val", "test") for a in unique)
    used = [a for a in unique if a.split != "train"] if own else unique
    chosen = {i for i, a in enumerate(used) if a.split == "val"} if own else _drawn(used, share, seed)
    prompts = [
        SweepPrompt(a.prompt, "selection" if i in chosen else "test", harmful or a.label == "harmful", a.label)
        for i, a in enumerate(used)
    ]
    left = [f"{n} {what} left out" for n, what in ((len(asked) - len(unique), "repeated texts"),) if n]
    left += [f"{len(unique) - len(used)} training rows left out"] if len(used) < len(unique) else []
    how = "by the file's splits" if own else f"drawn with seed {seed}" if chosen else "no selection"
    remark = f"{len(chosen)} prompts select, {len(used) - len(chosen)} test ({how})"
    return Roles(prompts, "; ".join([remark, *left]))


def _drawn(asked: Sequence[Asked], share: float, seed: int) -> set[int]:
    rng, chosen = random.Random(seed), set()
    for label in dict.fromkeys(a.label for a in asked):
        members = [i for i, a in enumerate(asked) if a.label == label]
        chosen |= set(rng.sample(members, round(share * len(members))))
    return chosen
