"""Identities that must hold before any number of a model is believed, each measured on the model in hand.

Every check is something that a published tool has got wrong (batches that differ from single prompts, caches that
change the text, a last layer read behind the final norm, hooks that stay after an error).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformer_lens import HookedTransformer

from safety_lens.activations import capture, encode_for
from safety_lens.data import Encoded, has_template
from safety_lens.generation import generate
from safety_lens.kv import left_padded
from safety_lens.log import Measurement
from safety_lens.models import hooks_at
from safety_lens.positions import all_tokens
from safety_lens.progress import progressed

PROMPTS = (
    "Once upon a time there was a little dog.",
    "The answer is",
    "Tell me, in one short sentence, what colour the sky has on a clear day, and why.",
)
# Relative to the root mean square of what is compared: float32 rounding through a deep model, and bfloat16's.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}


class Gap(NamedTuple):
    """Largest difference found, and what it was compared with, in the same unit."""

    largest: float
    scale: float


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it held, the relative gap and its tolerance (NaN where the check is yes or no)."""

    name: str
    ok: bool
    gap: float
    tolerance: float
    detail: str

    def to_measurement(self) -> Measurement:
        return Measurement(
            "doctor", self.name, self.gap, high=self.tolerance, note=f"{'ok' if self.ok else 'FAILED'}: {self.detail}"
        )


def gap_between(a: torch.Tensor, b: torch.Tensor) -> Gap:
    return Gap(float((a - b).abs().max()), float(b.double().pow(2).mean().sqrt()))


def examine(model: HookedTransformer, prompts: Sequence[str] = PROMPTS) -> list[Finding]:
    """Run every check of reading and generating; the model is left as found."""
    return [*run_checks(model, CHECKS, encode_for(model, prompts)), _template_finding(model)]


def run_checks(model: HookedTransformer, checks: "Sequence[Listed]", encoded: list[Encoded]) -> list[Finding]:
    """Run checks, each against the tolerance of the model's dtype, or bit for bit."""
    tolerance = TOLERANCE.get(model.cfg.dtype, TOLERANCE[torch.bfloat16])
    findings = []
    for number, (name, check, exact, what) in enumerate(checks):
        progressed("checks", number, len(checks))
        gap = check(model, encoded)
        relative = gap.largest / gap.scale if gap.scale else gap.largest
        allowed = 0.0 if exact else tolerance
        findings.append(Finding(name, relative <= allowed, relative, allowed, what))
    return findings


def _batch_is_single(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    hook = hooks_at(model)[-1]
    together = capture(model, encoded, [hook], reuse_prefix=False).acts[hook]
    alone = torch.cat([capture(model, [e], [hook]).acts[hook] for e in encoded])
    return gap_between(together, alone)


def _prefix_reuse(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    hook = hooks_at(model)[-1]
    ends = [e.ids[-3:] for e in encoded]
    joined = [Encoded((encoded[0].ids * 8)[:96] + end, "", None, None) for end in ends for _ in range(4)]
    reused, plain = (capture(model, joined, [hook], reuse_prefix=reuse).acts[hook] for reuse in (True, False))
    return gap_between(reused, plain)


def _cached_text(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    """Greedy tokens with the cache against logits of the whole text: how far below the best each chosen token lies."""
    worst, scale = 0.0, 1.0
    for e, new in zip(encoded, generate(model, encoded, max_new_tokens=8, ignore_eos=True), strict=True):
        tokens, mask = left_padded([[*e.ids, *new.tokens]], model.cfg.device or "cpu")
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask)[0, len(e.ids) - 1 : -1].double()
        chosen = logits.gather(1, torch.tensor(new.tokens, device=logits.device)[:, None])[:, 0]
        worst, scale = max(worst, float((logits.max(1).values - chosen).max())), float(logits.std())
    return Gap(worst, scale)


def _zero_edit(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    tokens, mask = left_padded([e.ids for e in encoded], model.cfg.device or "cpu")
    zero = [(name, lambda act, hook: act + torch.zeros_like(act[:1, :1])) for name in hooks_at(model)]
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask)
        with model.hooks(fwd_hooks=zero):
            edited = model(tokens, attention_mask=mask)
    return gap_between(edited, plain)


def _read_is_write(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    """A vector added at a hook is what reading that hook finds added, at every token."""
    hook = hooks_at(model)[model.cfg.n_layers // 2]
    plain = capture(model, encoded, [hook], positions=all_tokens).acts[hook]
    vector = torch.linspace(-1, 1, plain.shape[1]) * plain.std()
    edit = (hook, lambda act, hook: act + vector.to(act))
    moved = capture(model, encoded, [hook], positions=all_tokens, edits=[edit]).acts[hook]
    return Gap(float((moved - plain - vector).abs().max()), float(plain.abs().max()))


def _before_final_norm(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    """The last block's resid_post, normed and unembedded here, gives the model's own logits."""
    hook = hooks_at(model)[-1]
    tokens, mask = left_padded([encoded[0].ids], model.cfg.device or "cpu")
    seen = []
    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, lambda act, hook: seen.append(act))]):
        logits = model(tokens, attention_mask=mask)
        rebuilt = model.unembed(model.ln_final(seen[0]))
    cap = model.cfg.output_logits_soft_cap
    if cap > 0:
        rebuilt = cap * torch.tanh(rebuilt / cap)
    return gap_between(rebuilt, logits)


def _deterministic(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    hook = hooks_at(model)[-1]
    first, second = (capture(model, encoded, [hook]).acts[hook] for _ in range(2))
    return gap_between(first, second)


def _hooks_removed(model: HookedTransformer, encoded: list[Encoded]) -> Gap:
    """After an exception inside a hook, as many hooks are left as there were before."""

    class _Stop(Exception):
        pass

    def raise_stop(act: torch.Tensor, hook: object) -> None:
        raise _Stop

    def count() -> int:
        return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())

    before = count()
    try:
        capture(model, encoded, [hooks_at(model)[0]], edits=[(hooks_at(model)[0], raise_stop)])
    except _Stop:
        return Gap(float(count() - before), 0.0)
    return Gap(float("inf"), 0.0)  # the hook never fired


Check = Callable[[HookedTransformer, list[Encoded]], Gap]
Listed = tuple[str, Check, bool, str]
"""A check: its name, its function, whether it must hold bit for bit, what it says."""

CHECKS: tuple[Listed, ...] = (
    ("batch_is_single", _batch_is_single, False, "a prompt in a padded batch reads as it does alone"),
    ("prefix_reuse", _prefix_reuse, False, "running a shared prefix once changes nothing"),
    ("cached_text", _cached_text, False, "tokens chosen with the cache are the best without it"),
    ("zero_edit", _zero_edit, True, "adding zero at every block leaves the logits bit for bit"),
    ("read_is_write", _read_is_write, False, "what is added at a hook is what reading it finds"),
    ("before_final_norm", _before_final_norm, False, "the last resid_post is read before the final norm"),
    ("deterministic", _deterministic, True, "two readings are bit for bit equal"),
    ("hooks_removed", _hooks_removed, True, "an error in a hook leaves no hook behind"),
)


def _template_finding(model: HookedTransformer) -> Finding:
    """One BOS at most in a rendered prompt."""
    tokenizer = model.tokenizer
    ids = encode_for(model, ["Hello"])[0].ids
    bos = tokenizer.bos_token_id
    count = sum(token == bos for token in ids[:2]) if bos is not None else 0
    kind = "chat template" if has_template(tokenizer) else "no chat template: prompts are plain text"
    return Finding("single_bos", count <= 1, float("nan"), float("nan"), f"{count} BOS in front ({kind})")
