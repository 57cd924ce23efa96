"""Before and after: what a model says to a prompt with and without suppression, and which tokens were touched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformer_lens import HookedTransformer

from safety_lens.errors import DataError
from safety_lens.generation import Generation, generate
from safety_lens.interventions.suppression.apply import AUTO, Source, Suppression, suppress
from safety_lens.interventions.suppression.data import BUILT_IN
from safety_lens.interventions.suppression.firing import Seen, clustered_share
from safety_lens.stats import Interval
from safety_lens.types import Prompt


@dataclass(frozen=True, eq=False)
class BeforeAfter:
    """One prompt.

    before: the unedited answer, None where it was not asked for. after: the answer under suppression. tokens: prompt
    and answer as the edits saw them (the last token written is never read again). seen: every token at every edit.
    """

    prompt: Prompt
    before: str | None
    after: str
    tokens: tuple[str, ...]
    seen: tuple[Seen, ...]
    suppression: Suppression

    @property
    def touched(self) -> tuple[bool, ...]:
        """Per token, whether any edit touched it."""
        hit = {s.position for s in self.seen if s.touched}
        return tuple(i in hit for i in range(len(self.tokens)))

    @property
    def firing(self) -> float:
        """Share of tokens touched; NaN without tokens."""
        return sum(self.touched) / len(self.tokens) if self.tokens else float("nan")

    def __str__(self) -> str:
        lines = [] if self.before is None else [f"before: {self.before}"]
        return "\n".join([*lines, f"after:  {self.after}", self.suppression.explain])


def suppress_prompt(
    prompt: Prompt,
    model: "str | HookedTransformer" = "organism",
    scale: float = 1.0,
    mode: str = AUTO,
    *,
    concept_or_pairs: Source = BUILT_IN,
    compare: bool = True,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    ignore_eos: bool = False,
    seed: int = 0,
    **how: Any,
) -> BeforeAfter:
    """Answer a prompt with and without suppression; loading, fitting and choosing included (and cached).

    Args:
        model: as `load_model` takes it, or a loaded model.
        how: further arguments of `suppress`: categories, layers, site, read, ancestor, false_fire, …

    Raises:
        DataError: an empty prompt, or as `suppress`.
    """
    from safety_lens.models import load_model

    check_prompts([prompt])
    hooked = model if isinstance(model, HookedTransformer) else load_model(model)
    found = suppress(hooked, concept_or_pairs, mode, scale, seed=seed, **how)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "ignore_eos": ignore_eos,
        "seed": seed,
    }
    return before_after(hooked, [prompt], found, compare=compare, **settings)[0]


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse no prompts, and prompts without text.

    Raises:
        DataError: the number of the empty one.
    """
    if not prompts:
        raise DataError("there is no prompt: give one or more")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) and not prompt.strip():
            raise DataError(f"prompt {i} is empty: give it some text")


def before_after(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    suppression: Suppression,
    *,
    compare: bool = True,
    on_token: Callable[[int, int], None] | None = None,
    **generation: Any,
) -> list[BeforeAfter]:
    """Answers of several prompts with and without suppression, drawn with the same random numbers.

    generation: further arguments of `generate`.

    Raises:
        DataError: as `check_prompts` and `generate`.
    """
    check_prompts(prompts)
    plain: Sequence[Generation | None] = [None] * len(prompts)
    if compare:
        plain = generate(model, prompts, **generation)
    hooks, log = suppression.watched()
    edited = generate(model, prompts, hooks=hooks, on_token=on_token, **generation)
    seen: dict[int, list[Seen]] = {}
    for entry in log.rows:
        seen.setdefault(entry.row, []).append(entry)
    out = []
    for i, (before, after) in enumerate(zip(plain, edited, strict=True)):
        own = tuple(seen.get(i, ()))
        tokens = _tokens(model, prompts[i], after, generation)
        kept = tokens[: 1 + max((s.position for s in own), default=len(tokens) - 1)]
        out.append(BeforeAfter(prompts[i], before.text if before else None, after.text, kept, own, suppression))
    return out


def _tokens(
    model: HookedTransformer, prompt: Prompt, answer: Generation, generation: dict[str, Any]
) -> tuple[str, ...]:
    from safety_lens.activations import encode_for

    encoded = encode_for(
        model, [prompt], raw=generation.get("raw", False), template_kwargs=generation.get("template_kwargs")
    )[0]
    return tuple(str(model.tokenizer.decode([i])) for i in (*encoded.ids, *answer.tokens))


def firing_rate(answers: Sequence[BeforeAfter]) -> Interval:
    """Share of tokens touched over several prompts, with an interval that counts prompts."""
    import numpy as np

    touched = [t for answer in answers for t in answer.touched]
    rows = [i for i, answer in enumerate(answers) for _ in answer.touched]
    return clustered_share(np.array(touched, dtype=bool), np.array(rows, dtype=int))
