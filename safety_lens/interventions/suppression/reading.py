"""What is read at each hook before anything is suppressed: means, components, and how natural tokens lie.

The model is read on prompts followed by its own unedited greedy answer, so that prompt tokens and written tokens can
both be looked at. First tokens are never read: in many models theirs are a hundred times as long as the others
(attention sinks). Fits and statistics take one row per prompt, the mean over the tokens that `read` names; thresholds
take single tokens, because a gate sees single tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import capture, encode_for
from safety_lens.data import ContrastPair, Encoded
from safety_lens.errors import DataError
from safety_lens.generation import generate
from safety_lens.interventions.suppression.data import UNNAMED, ArtifactPairs, artifacts, category_of, naturals
from safety_lens.models import hooks_at
from safety_lens.positions import Positions
from safety_lens.types import Prompt

SITES = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
"""What is edited in each block: the residual stream behind it, or what its MLP or its attention writes."""
ANSWER_TOKENS = 20
"""Tokens of the unedited answer that are looked at beside the prompt."""


def site_hooks(model: HookedTransformer, site: str, layers: Sequence[int] | None) -> list[str]:
    """Hook names of a site in the blocks asked for (None: all).

    Raises:
        DataError: an unknown site, or no block.
        HookNameError: a block that the model does not have.
    """
    if site not in SITES:
        raise DataError(f"no site {site!r}: choose {', '.join(SITES)}")
    if layers is not None and not layers:
        raise DataError("no layer was named; leave layers out for the default")
    return list(dict.fromkeys(hooks_at(model, SITES[site], layers)))


def _prompt_end(e: Encoded) -> int:
    return len(e.ids) if e.answer is None else e.answer[0]


def _prompt(e: Encoded) -> Sequence[int]:
    return range(min(1, _prompt_end(e) - 1), _prompt_end(e))


def _last(e: Encoded) -> Sequence[int]:
    return (_prompt_end(e) - 1,)


def _instruction(e: Encoded) -> Sequence[int]:
    if e.instruction is None:
        raise DataError(f"a prompt ending in {e.text[-40:]!r} has no user turn that can be found; use read='prompt'")
    return range(*e.instruction)


def _everything(e: Encoded) -> Sequence[int]:
    return range(min(1, len(e.ids) - 1), len(e.ids))


_READS = {"last": _last, "prompt": _prompt, "instruction": _instruction}


def read_rule(name: str) -> tuple[Positions, int]:
    """The tokens that a spelling names, and how many answer tokens it needs.

    "last": the last prompt token. "instruction": the user's text. "prompt": every prompt token but the first.
    "answer:K": the first K tokens of the unedited answer (the seed read 20).

    Raises:
        DataError: another spelling.
    """
    if name in _READS:
        return Positions(name, _READS[name], mean=True), 0
    found = re.fullmatch(r"answer(?::([1-9]\d*))?", name)
    if not found:
        raise DataError(f"read {name!r} is not known: choose {', '.join(_READS)} or answer:K")
    count = int(found[1] or ANSWER_TOKENS)
    return Positions(
        name, lambda e: range(e.answer[0], min(e.answer[1], e.answer[0] + count)) if e.answer else (), mean=True
    ), count


every_token = Positions("every token but the first", _everything)


def with_answers(
    model: HookedTransformer, prompts: Sequence[Prompt | Encoded], tokens: int, *, raw: bool = False
) -> list[Encoded]:
    """Prompts with the model's own unedited greedy answer of up to `tokens` tokens behind them.

    An answer that ends at once is the stop token alone, so that there is something to read.
    """
    encoded = encode_for(model, prompts, raw=raw)
    if tokens == 0:
        return encoded
    written = generate(model, encoded, max_new_tokens=tokens)
    stop = getattr(model.tokenizer, "eos_token_id", None)
    return [
        replace(e, ids=(*e.ids, *own), answer=(len(e.ids), len(e.ids) + len(own)))
        for e, g in zip(encoded, written, strict=True)
        for own in [g.tokens or ((0 if stop is None else stop),)]
    ]


@dataclass(frozen=True, eq=False)
class HookFit:
    """One hook, fitted in raw activation space.

    category: of the pairs that fitted it, `UNNAMED` for all of them.
    natural, artifact: mean activation of either side, over prompts. components: leading right singular vectors of the
    uncentred within-pair differences, strongest first, rows of length 1. aligned, distance: of every held-out natural
    token, its alignment ⟨o − natural, u⟩ in gaps and its distance to `artifact` in activation units.
    reach: distances of the held-out artifact prompts' rows to `artifact`. held_artifact, held_natural: alignments, in
    gaps, of the rows of the held-out pairs.
    """

    hook: str
    category: str
    natural: Float[Tensor, " d"]
    artifact: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]
    aligned: Float[Tensor, " token"]
    distance: Float[Tensor, " token"]
    reach: Float[Tensor, " prompt"]
    held_artifact: Float[Tensor, " prompt"]
    held_natural: Float[Tensor, " prompt"]

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """From the natural mean to the artifact mean."""
        return self.artifact - self.natural

    @property
    def gap(self) -> float:
        """Length of `vector`: the unit of strength."""
        return float(self.vector.double().norm())

    @property
    def unit(self) -> Float[Tensor, " d"]:
        found: Tensor = self.vector / self.vector.norm()
        return found

    def alignment(self, acts: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Signed alignment in gaps: 0 at the natural mean, 1 at the artifact mean."""
        wide = acts.float() if acts.dtype in (torch.float16, torch.bfloat16) else acts
        return (wide - self.natural.to(wide)) @ self.unit.to(wide) / self.gap


@dataclass(frozen=True, eq=False)
class Rows:
    """One row per prompt of one part of the pairs, and single natural tokens where they were read.

    artifact, natural: hook → [pair, d]. tokens: hook → [token, d]; token_prompt: which pair each came from.
    """

    artifact: dict[str, Float[Tensor, "pair d"]]
    natural: dict[str, Float[Tensor, "pair d"]]
    tokens: dict[str, Float[Tensor, "token d"]]
    token_prompt: Int[Tensor, " token"]

    def part(self, pairs: Sequence[int]) -> "Rows":
        """The rows of some pairs; the natural tokens stay those of all of them."""
        at = torch.as_tensor(list(pairs), dtype=torch.long)
        artifact, natural = ({hook: rows[at] for hook, rows in side.items()} for side in (self.artifact, self.natural))
        return Rows(artifact, natural, self.tokens, self.token_prompt)


def read_pairs(
    model: HookedTransformer,
    pairs: Sequence[ContrastPair],
    hooks: Sequence[str],
    *,
    read: str = "last",
    raw: bool = False,
    tokens: bool = False,
) -> Rows:
    """Rows of pairs at the hooks. tokens: also every natural token, prompt and unedited answer, but the first."""
    rule, needed = read_rule(read)
    artifact = with_answers(model, artifacts(pairs), needed, raw=raw)
    natural = with_answers(model, naturals(pairs), max(needed, ANSWER_TOKENS if tokens else 0), raw=raw)
    pos = capture(model, artifact, hooks, positions=rule).acts
    neg = capture(model, natural, hooks, positions=rule).acts
    if not tokens:
        return Rows(pos, neg, {}, torch.zeros(0, dtype=torch.long))
    every = capture(model, natural, hooks, positions=every_token)
    return Rows(pos, neg, every.acts, every.prompt)


def fit_hooks(
    model: HookedTransformer, pairs: ArtifactPairs, hooks: Sequence[str], *, read: str = "last", components: int = 5
) -> list[HookFit]:
    """Fit every hook on the fit pairs and read the calibration pairs for its thresholds.

    One fit of all pairs (category `UNNAMED`) and, where there are several categories, one of each: the artifacts of
    different categories lie in different places.

    Raises:
        DataError: no gap at any of the hooks, too few pairs of a category, or a bad number of components.
    """
    if components < 1:
        raise DataError(f"components must be 1 or more, got {components}")
    fit = read_pairs(model, pairs.fit, hooks, read=read, raw=pairs.raw)
    held = read_pairs(model, pairs.calibrate, hooks, read=read, raw=pairs.raw, tokens=True)
    found = []
    for category in [UNNAMED, *(pairs.categories if len(pairs.categories) > 1 else ())]:
        chosen = [_members(part, category) for part in (pairs.fit, pairs.calibrate)]
        if len(chosen[0]) < 2 or not chosen[1]:
            raise DataError(
                f"category {category!r} of {pairs.source} has {len(chosen[0])} pairs to fit and {len(chosen[1])} to"
                " calibrate; 2 and 1 are needed: give more pairs of it, or leave it out with categories"
            )
        found += [_fit(hook, category, fit.part(chosen[0]), held.part(chosen[1]), components) for hook in hooks]
    usable = [f for f in found if f is not None]
    if not usable:
        raise DataError(f"natural and artifact prompts have the same mean at {', '.join(hooks)}: nothing to suppress")
    return usable


def _members(pairs: Sequence[ContrastPair], category: str) -> list[int]:
    return [i for i, pair in enumerate(pairs) if category in (UNNAMED, category_of(pair))]


def _fit(hook: str, category: str, fit: Rows, held: Rows, components: int) -> HookFit | None:
    """None where the sides do not differ beyond rounding (the embedding of a shared last token)."""
    pos, neg = fit.artifact[hook].double(), fit.natural[hook].double()
    natural, artifact = neg.mean(0), pos.mean(0)
    if float((artifact - natural).norm()) <= 1e-6 * float(torch.cat([pos, neg]).norm(dim=1).mean()):
        return None
    _, values, right = torch.linalg.svd(pos - neg, full_matrices=False)
    kept = right[: min(components, int((values > 1e-6 * values[0]).sum()))]
    empty = natural[:0]
    wide = HookFit(hook, category, natural, artifact, kept, empty, empty, empty, empty, empty)
    tokens = held.tokens[hook].double()
    return HookFit(
        hook,
        category,
        natural.float(),
        artifact.float(),
        kept.float(),
        wide.alignment(tokens).float(),
        (tokens - artifact).norm(dim=1).float(),
        (held.artifact[hook].double() - artifact).norm(dim=1).float(),
        wide.alignment(held.artifact[hook].double()).float(),
        wide.alignment(held.natural[hook].double()).float(),
    )
