"""Where a page comes from, as rows of a name with a text, or with named texts."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from hashlib import sha256
from json import dumps
from typing import Any

from transformer_lens import HookedTransformer

from safety_lens.artifacts import fingerprint, versions
from safety_lens.probes.attribution.scores import Scores
from safety_lens.probes.directions import Direction
from safety_lens.probes.groups import NeuronGroup
from safety_lens.report.pages.prompts import PagePrompt

Fact = str | Sequence[tuple[str, str]]
"""A text, or several with a name each."""


def provenance(
    model: HookedTransformer,
    groups: Sequence[NeuronGroup],
    asked: Sequence[PagePrompt],
    scores: Mapping[str, Scores],
    directions: Sequence[Direction],
    source: str,
) -> list[tuple[str, Fact]]:
    """Model, data, groups, scores, directions, date and versions, the model first."""
    known = fingerprint(model)
    name = known["name"] + (f" @ {known['revision']}" if known["revision"] else "")
    adapter = f", adapter {known['adapter']}" if known["adapter"] else ""
    size = f"{known['n_layers']} blocks, width {known['d_model']}"
    labels = ", ".join(
        f"{sum(p.label == x for p in asked)} {x or 'without label'}" for x in dict.fromkeys(p.label for p in asked)
    )
    digest = sha256(dumps([[p.prompt, p.label] for p in asked], default=str).encode()).hexdigest()
    rows: list[tuple[str, Fact]] = [
        ("model", f"{name}{adapter}; {known['architecture']}, {size}; weights sha256 {known['weights_sha256'][:16]}"),
        ("prompts", f"{len(asked)} ({labels}), {source}; sha256 {digest[:16]}"),
    ]
    rows += [(f"group {g.name}", [("members", f"{g.size} {g.unit}s"), *_facts(g.source)]) for g in groups]
    rows += [
        (
            f"scores {key}",
            [("score", f"{s.method}, {'signed' if s.signed else 'unsigned'}"), ("n", str(s.n)), *_facts(s.source)],
        )
        for key, s in scores.items()
    ]
    rows += [(f"direction {d.concept}", f"{d.method} at {d.hook}") for d in directions]
    used = versions()
    rows.append(("date", datetime.now(timezone.utc).isoformat(timespec="seconds")))
    rows.append(("versions", ", ".join(f"{k} {used[k]}" for k in ("safety-lens-tl", "torch", "transformer-lens"))))
    return rows


def _facts(source: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A source as names and texts."""
    return [(name, _plain(name, value)) for name, value in source.items()] or [("source", "unknown")]


def _plain(name: str, value: Any) -> str:
    """A value in words. Of a model only the hash of its weights, shortened: the page's own model stands above."""
    if name == "model" and isinstance(value, Mapping):
        return f"weights sha256 {str(value.get('weights_sha256', value.get('name')))[:16]}"
    if name.endswith("sha256"):
        return str(value)[:16]
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_plain(str(key), inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain("", inner) for inner in value)
    return "none" if value is None else str(value)
