"""Identities that edits must keep on the model in hand, measured like those of `safety_lens.conformance`.

Each is one that a published steering tool breaks: a zero that changes the text, edits that miss the tokens asked for
once a cache is used, a batch whose other rows are silently not steered, hooks that stay after an error.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.activations import capture, encode_for
from safety_lens.conformance import PROMPTS, Finding, Gap, Listed, gap_between, run_checks
from safety_lens.data import Encoded
from safety_lens.frames import Frame
from safety_lens.generation import generate
from safety_lens.interventions.edits import Edit, Watch, unit_of
from safety_lens.interventions.rows import by_row
from safety_lens.interventions.steering import ablate, affine, applied, clamp, is_writing_site, steer
from safety_lens.interventions.weights import can_orthogonalize, orthogonalized
from safety_lens.kv import left_padded
from safety_lens.models import hooks_at
from safety_lens.probes.directions import Direction
from safety_lens.types import FwdHook

NEW = 6
ASKED = {
    "all": lambda prompt, end: range(end),
    "prompt": lambda prompt, end: range(prompt),
    "generated": lambda prompt, end: range(prompt, end),
    "answer": lambda prompt, end: range(prompt - 1, end),
    "from:2": lambda prompt, end: range(2, end),
    "from:-2": lambda prompt, end: range(max(prompt - 2, 0), end),
}
"""Which tokens of a prompt and its continuation each scope means, written down a second time."""


def examine_edits(model: HookedTransformer, prompts: Sequence[str] = PROMPTS) -> list[Finding]:
    """Run every check of edits; the model is left as found."""
    findings = run_checks(model, CHECKS, encode_for(model, prompts))
    if can_orthogonalize(model):
        return [*findings, *run_checks(model, WEIGHT_CHECKS, encode_for(model, prompts))]
    nan = float("nan")
    why = "does not apply: norms behind attention and MLP, so ablating needs hooks"
    return [*findings, *(Finding(name, True, nan, nan, why) for name, *_ in WEIGHT_CHECKS)]


def _probe(model: HookedTransformer, encoded: Sequence[Encoded]) -> Direction:
    """A random direction at the middle block, as long as the activations there are."""
    hook = hooks_at(model)[model.cfg.n_layers // 2]
    typical = capture(model, encoded, [hook]).acts[hook].double().norm(dim=1).median()
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Direction("conformance", hook, (vector / vector.norm() * typical).float(), "random")


def _logits(model: HookedTransformer, encoded: Sequence[Encoded], hooks: Sequence[FwdHook] = ()) -> Tensor:
    """Logits of every real token of the prompts, in one padded batch."""
    tokens, mask = left_padded([e.ids for e in encoded], model.cfg.device or "cpu")
    with torch.no_grad(), applied(model, hooks):
        logits: Tensor = model(tokens, attention_mask=mask)
    return logits[mask.bool()]


def _strength_zero(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    d = _probe(model, encoded)
    nothing = [*steer(d, 0.0, at=hooks_at(model)), *ablate(d, 0.0), *affine(d, 1.0, 0.0)]
    return gap_between(_logits(model, encoded, nothing), _logits(model, encoded))


def _ablation_complete(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    """What is left along the direction at all sites, against what was there."""
    d = _probe(model, encoded)
    sites = [name for name in model.hook_dict if is_writing_site(name)]
    left = capture(model, encoded, sites, edits=ablate(d)).acts
    found = capture(model, encoded, sites).acts
    unit = unit_of(d.vector).cpu()
    worst = max(float((left[s].double() @ unit).abs().max() / found[s].double().norm(dim=1).max()) for s in sites)
    return Gap(worst, 1.0)


def _asked_tokens(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    """Tokens written under each scope, with cache and padding, against a forward that edits by token index.

    Infinite where the edit says that it touched others than those asked for.
    """
    d, worst, scale = _probe(model, encoded), 0.0, 1.0
    for scope, asked in ASKED.items():
        touched: set[tuple[int, int]] = set()
        hooks: list[FwdHook] = [(at, edit.watched(_into(touched))) for at, edit in _edits(steer(d, scope=scope))]
        texts = generate(model, encoded, hooks=hooks, max_new_tokens=NEW, ignore_eos=True)
        for i, (e, text) in enumerate(zip(encoded, texts, strict=True)):
            ids = (*e.ids, *text.tokens)[:-1]  # the last token is written, never read
            indices = list(asked(len(e.ids), len(ids)))
            if {pos for row, pos in touched if row == i} != set(indices):
                return Gap(float("inf"), 1.0)
            logits = _by_index(model, ids, d, indices)[len(e.ids) - 1 :].double()
            chosen = logits.gather(1, torch.tensor(text.tokens, device=logits.device)[:, None])[:, 0]
            worst, scale = max(worst, float((logits.max(1).values - chosen).max())), float(logits.std())
    return Gap(worst, scale)


def _edits(hooks: Sequence[FwdHook]) -> list[tuple[str, Edit]]:
    return [(at, fn) for at, fn in hooks if isinstance(at, str) and isinstance(fn, Edit)]


def _into(touched: set[tuple[int, int]]) -> Watch:
    """Notes (row, token) of everything touched."""

    def watch(frame: Frame, x: Tensor, where: Tensor) -> None:
        rows = frame.row[:, None].expand_as(frame.position)
        touched.update(zip(rows[where].tolist(), frame.position[where].tolist(), strict=True))

    return watch


def _by_index(
    model: HookedTransformer, ids: Sequence[int], d: Direction, indices: list[int]
) -> Float[Tensor, "pos d_vocab"]:
    def add(act: Tensor, hook: object) -> Tensor:
        out = act.clone()
        out[:, indices] = (out[:, indices].to(d.vector) + d.vector.to(act.device)).to(act.dtype)
        return out

    tokens: Int[Tensor, "1 pos"] = torch.tensor([list(ids)], device=model.cfg.device)
    with torch.no_grad(), model.hooks(fwd_hooks=[(d.hook, add)]):
        logits: Tensor = model(tokens, attention_mask=torch.ones_like(tokens))
    return logits[0]


def _rows_are_single(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    """A batch in which every row has another edit, against each row alone with its edit."""
    d, last = _probe(model, encoded), hooks_at(model)[-1]
    kinds: list[list[FwdHook]] = [steer(d), ablate(d), [], steer(d, -1.0), clamp(d, 0.0, 1.0, at=d.hook)]
    prompts = [encoded[i % len(encoded)] for i in range(len(kinds))]
    together = capture(model, prompts, [last], edits=by_row(model, kinds)).acts[last]
    alone = torch.cat(
        [capture(model, [p], [last], edits=hooks).acts[last] for p, hooks in zip(prompts, kinds, strict=True)]
    )
    return gap_between(together, alone)


def _nothing_left(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    """Hooks more than before, after an error inside an edited generation."""

    class _Stop(Exception):
        pass

    def stop(act: Tensor, hook: object) -> None:
        raise _Stop

    before = sum(1 for _ in _all_hooks(model))
    try:
        with applied(model, ablate(_probe(model, encoded))):
            generate(model, encoded, hooks=[(hooks_at(model)[-1], stop)], max_new_tokens=1)
    except _Stop:
        return Gap(float(abs(sum(1 for _ in _all_hooks(model)) - before)), 0.0)
    return Gap(float("inf"), 0.0)  # the hook never fired


def _all_hooks(model: HookedTransformer) -> Iterator[object]:
    for point in model.hook_dict.values():
        yield from (*point.fwd_hooks, *point.bwd_hooks, *point._forward_hooks, *point._backward_hooks)


def _orthogonal_is_ablated(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    d = _probe(model, encoded)
    with orthogonalized(model, d):
        without = _logits(model, encoded)
    return gap_between(without, _logits(model, encoded, ablate(d)))


CHECKS: tuple[Listed, ...] = (
    ("strength_zero", _strength_zero, True, "edits of strength zero leave the logits bit for bit"),
    ("ablation_complete", _ablation_complete, False, "ablation leaves nothing along the direction at any writing site"),
    ("asked_tokens", _asked_tokens, False, "while generating, edits land on the tokens asked for and no others"),
    ("rows_are_single", _rows_are_single, False, "a batch with an edit per row equals each row alone"),
    ("nothing_left", _nothing_left, True, "an error inside an edited generation leaves no hook behind"),
)
WEIGHT_CHECKS: tuple[Listed, ...] = (
    ("orthogonal_is_ablated", _orthogonal_is_ablated, False, "weights without a direction equal ablation by hooks"),
)
