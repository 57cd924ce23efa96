"""Where a page comes from, as rows of name and text."""

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


def provenance(
    model: HookedTransformer,
    groups: Sequence[NeuronGroup],
    asked: Sequence[PagePrompt],
    scores: Mapping[str, Scores],
    directions: Sequence[Direction],
    source: str,
) -> list[tuple[str, str]]:
    """Model, data, groups, scores, directions, date and versions, the model first."""
    known = fingerprint(model)
    name = known["name"] + (f" @ {known['revision']}" if known["revision"] else "")
    adapter = f", adapter {known['adapter']}" if known["adapter"] else ""
    size = f"{known['n_layers']} blocks, width {known['d_model']}"
    labels = ", ".join(
        f"{sum(p.label == x for p in asked)} {x or 'without label'}" for x in dict.fromkeys(p.label for p in asked)
    )
    digest = sha256(dumps([[p.prompt, p.label] for p in asked], default=str).encode()).hexdigest()
    rows = [
        ("model", f"{name}{adapter}; {known['architecture']}, {size}; weights sha256 {known['weights_sha256'][:16]}"),
        ("prompts", f"{len(asked)} ({labels}), {source}; sha256 {digest[:16]}"),
    ]
    rows += [(f"group {g.name}", f"{g.size} {g.unit}s; {_facts(g.source)}") for g in groups]
    rows += [
        (f"scores {key}", f"{s.method}, {'signed' if s.signed else 'unsigned'}, n = {s.n}; {_facts(s.source)}")
        for key, s in scores.items()
    ]
    rows += [(f"direction {d.concept}", f"{d.method} at {d.hook}") for d in directions]
    used = versions()
    rows.append(("date", datetime.now(timezone.utc).isoformat(timespec="seconds")))
    rows.append(("versions", ", ".join(f"{k} {used[k]}" for k in ("safety-lens-tl", "torch", "transformer-lens"))))
    return rows


def _facts(source: Mapping[str, Any]) -> str:
    """A source in one line, hashes shortened; of a model only that of its weights, since the page's own model stands
    above."""
    facts = []
    for key, value in source.items():
        if key == "model" and isinstance(value, Mapping):
            value = str(value.get("weights_sha256", value.get("name")))[:16]
        if key.endswith("sha256"):
            value = str(value)[:16]
        facts.append(f"{key} {dumps(value, default=str) if isinstance(value, Mapping | list) else value}")
    return ", ".join(facts) or "source unknown"
