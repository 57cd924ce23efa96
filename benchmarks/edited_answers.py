"""Answers with a causal direction removed and added, on public requests that took no part, with controls on the texts.

The artifact is one of `safety-lens extract --select causal`. Harmful requests are answered with the direction removed
wherever the stream is written to, harmless ones with it added at its hook, 100 of each by default; rates, paired
changes and the agreement of labels with log-odds come with intervals, next to the cost in KL. Three kinds of control of
the same length at the same hook answer part of the same requests: draws from the covariance of the activations, refits
on shuffled labels, directions of other concepts. Labels alone are kept.

Run: python benchmarks/edited_answers.py --model MODEL --directions FOLDER --instructions refusal_instructions.jsonl
--out FILE.json
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safety_lens import load_concept, load_model
from safety_lens.activations import encode_for
from safety_lens.interventions.behaviours import Behaviour
from safety_lens.interventions.causality.after import measure_after
from safety_lens.interventions.causality.controls import CONTROLS, other_concepts
from safety_lens.interventions.side_effects import benign_kl, benign_rows
from safety_lens.interventions.steering import ablate, steer
from safety_lens.positions import last_token
from safety_lens.probes import load_directions
from safety_lens.probes.directions import Direction
from safety_lens.probes.estimators import estimator
from safety_lens.probes.reading import read_concepts
from safety_lens.probes.selection import Candidates, Choice


def requests(file: Path, label: str, n: int) -> list[str]:
    """Public requests of the test split."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [row["instruction"] for row in rows if row["label"] == label and row["split"] == "test"][:n]


def controls(model: Any, like: Direction, draws: int, seed: int) -> Iterator[tuple[str, Direction]]:
    """Directions of the three kinds, each with the name of its kind."""
    acts = read_concepts(model, [load_concept("refusal", model=model)], [like.hook])[0]
    candidates = Candidates(model, acts, {like.hook: like}, {}, "val", (), estimator(like.method))
    for kind, (make, _) in CONTROLS.items():
        yield from ((kind, direction) for direction in make(candidates, like, draws, seed))
    yield from other_concepts(model, like, last_token).items()


def coefficient(choice: Choice) -> float:
    """Coefficient with which the choice added its direction, at prompt tokens.

    Raises:
        ValueError: The choice is not a causal one.
    """
    found = [r.coeff for r in choice.measurements if (r.metric, r.hook) == ("induce", choice.hook)]
    if not found or found[0] is None:
        raise ValueError(f"{choice.hook} was not chosen by its effects: extract --select causal")
    return float(found[0])


def changes(
    model: Any, behaviour: Behaviour, sides: Sequence[Sequence[str]], direction: Direction, coeff: float
) -> dict[str, float]:
    """Rates of refusal with a direction removed (first prompts) and added (second prompts)."""
    removed = behaviour.labels(model, sides[0], ablate(direction))
    added = behaviour.labels(model, sides[1], steer(direction, coeff, scope="prompt"))
    return {"removed": float(np.nanmean(removed)), "added": float(np.nanmean(added))}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--directions", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--n", type=int, default=100, help="requests of each label")
    parser.add_argument("--control-n", type=int, default=24, help="requests of each label that controls answer")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, began = load_model(args.model), time.process_time()
    chosen = load_directions(args.directions, model)[0]
    direction, behaviour = chosen.best, Behaviour.from_entry(chosen.choice.behaviour, model)
    coeff = coefficient(chosen.choice)
    sides = [requests(args.instructions, label, args.n) for label in ("harmful", "harmless")]
    result: dict[str, Any] = {
        "hook": direction.hook,
        "openings": behaviour.openings.listed(12),
        "n": args.n,
        "coeff": coeff,
    }
    rows = measure_after(
        model, [(s, encode_for(model, s)) for s in sides], direction, behaviour, coeff=coeff, seed=args.seed
    )
    result["rows"] = {row.metric: [row.value, row.low, row.high, row.n] for row in rows}
    answers = benign_rows(model, sides[1][:24], max_new_tokens=16)
    costs = benign_kl(model, answers, [ablate(direction), steer(direction, coeff, scope="prompt")])
    result["kl per token"] = {k: list(c.mean) for k, c in zip(("removed", "added"), costs, strict=True)}
    print(json.dumps(result, indent=1), flush=True)
    few = [side[: args.control_n] for side in sides]
    plain = [float(np.nanmean(behaviour.labels(model, side))) for side in few]
    result["controls"] = {"before": plain, "direction": [changes(model, behaviour, few, direction, coeff)]}
    for kind, control in controls(model, direction, args.draws, args.seed):
        result["controls"].setdefault(kind, []).append(changes(model, behaviour, few, control, coeff))
        print(kind, result["controls"][kind][-1], flush=True)
        args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    result["cpu seconds"] = time.process_time() - began
    args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
