"""A neuron page as one HTML document: what it holds as compact JSON, and the elements that its script fills."""

import base64
import html
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from safety_lens.report.offline import bundle, document, inert, visible
from safety_lens.report.pages.columns import Column
from safety_lens.report.pages.prompts import ShownPrompt
from safety_lens.report.pages.provenance import Fact

TOP = 32767
"""Values are kept as 16-bit steps: a column's largest value is this many."""

PICKS = (
    ("group", "Group", ()),
    ("layer", "Layer", ()),
    ("column", "Neuron or head", ()),
    (
        "order",
        "Prompts",
        (
            ("strongest", "strongest first"),
            ("highest", "highest first"),
            ("lowest", "lowest first"),
            ("given", "as given"),
        ),
    ),
    ("shown", "Show", (("5", "5"), ("10", "10"), ("20", "20"), ("all", "all"))),
    ("scale", "Colours", (("own", "scale of this column"), ("kind", "one scale for all of its kind"))),
)


def neuron_document(
    title: str,
    prompts: Sequence[ShownPrompt],
    columns: Sequence[Column],
    values: Float[np.ndarray, "column token"],
    groups: Sequence[str],
    scores: Sequence[str],
    notes: Sequence[str],
    provenance: Sequence[tuple[str, Fact]],
) -> str:
    """The page. groups, scores: names in the order in which they are listed."""
    words: dict[str, int] = {}
    shown = [_prompt(prompt, words) for prompt in prompts]
    largest = np.abs(values).max(1, initial=0.0)
    unit = np.where(largest > 0, largest, 1.0) / TOP
    data = {
        "prompts": shown,
        "words": list(words),
        "groups": [visible(name) for name in groups],
        "scores": [visible(name) for name in scores],
        "columns": [
            _column(column, float(step), float(scale))
            for column, step, scale in zip(columns, unit, scales(values, prompts), strict=True)
        ],
        "values": _packed(np.rint(values / unit[:, None]).astype(np.int16)),
    }
    script = files("safety_lens.report.pages").joinpath("page.js").read_text(encoding="utf-8")
    style = files("safety_lens.report.pages").joinpath("page.css").read_text(encoding="utf-8")
    body = _body(title, prompts, notes, provenance)
    return document(title, body, style=style, scripts=[bundle(), script], data=data)


def scales(values: Float[np.ndarray, "column token"], prompts: Sequence[ShownPrompt]) -> Float[np.ndarray, " column"]:
    """Largest |value| of each column over all tokens of all prompts but those that every prompt begins with: what its
    full colour stands for. 1 where a column is 0 throughout."""
    counted = np.concatenate([np.arange(len(p.tokens)) >= p.start for p in prompts])
    largest = np.abs(values[:, counted]).max(1, initial=0.0)
    return np.where(largest > 0, largest, 1.0)


def _packed(steps: Int[np.ndarray, "column token"]) -> str:
    return base64.b64encode(steps.astype("<i2").tobytes()).decode()


def _prompt(prompt: ShownPrompt, words: dict[str, int]) -> dict[str, Any]:
    tokens = [words.setdefault(inert(token), len(words)) for token in prompt.tokens]
    label = None if prompt.label is None else visible(prompt.label)
    return {"tokens": tokens, "label": label, "harmful": prompt.harmful, "start": prompt.start, "cut": prompt.cut}


def _column(column: Column, step: float, scale: float) -> dict[str, Any]:
    return {
        "kind": column.kind,
        "layer": column.layer,
        "name": visible(column.name),
        "hook": column.hook,
        "member": {visible(name): _digits(x) for name, x in column.member.items()},
        "scores": {visible(name): _digits(x) for name, x in column.scores.items()},
        "raises": [(word, _digits(x)) for word, x in column.raises],
        "lowers": [(word, _digits(x)) for word, x in column.lowers],
        "note": visible(column.note) if column.note else "",
        "step": step,
        "scale": _digits(scale),
    }


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def _body(
    title: str, prompts: Sequence[ShownPrompt], notes: Sequence[str], provenance: Sequence[tuple[str, Fact]]
) -> str:
    picks = "".join(
        f'<label>{label} <select id="{name}">'
        + "".join(f'<option value="{value}">{text}</option>' for value, text in options)
        + "</select></label>"
        for name, label, options in PICKS
    )
    start = min(p.start for p in prompts)
    left = f" The first {start} tokens, which all prompts share, count for neither scale nor order." if start else ""
    first = provenance[0][1]
    model = f": {html.escape(first)}" if isinstance(first, str) else ""
    remarks = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return f"""<h1>{html.escape(title)}</h1>
{remarks}<details id="provenance"><summary>Where this comes from{model}</summary>
{_definitions(provenance)}</details>
<div class="picks">{picks}</div>
<div class="columns"><aside><p><span id="count"></span> of this page. By group: ✓ or the share of its weights that
the group holds; then scores, and the largest |value|. <span id="sorted"></span></p>
<div class="scroll"><table><thead id="heads"></thead><tbody id="rows"></tbody></table></div></aside>
<main><div id="card"></div><div class="legend"><span id="meaning"></span><div id="legend"></div>
<span class="note">The scale is the same for every token of every prompt; stronger values keep the last colour.{left}
Point at a token for its value.</span></div><div id="prompts"></div></main></div>"""


def _definitions(facts: Sequence[tuple[str, Fact]]) -> str:
    """A definition list, with lists inside for what has several facts; everything escaped."""
    rows = (
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(fact) if isinstance(fact, str) else _definitions(fact)}</dd>"
        for name, fact in facts
    )
    return f"<dl>{''.join(rows)}</dl>"
