"""Concepts whose truth is known: random activations without a model, and word-level prompts with one."""

from collections.abc import Callable, Mapping, Sequence

import torch
import zoo
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from safety_lens.data import Concept, ContrastPair
from safety_lens.positions import last_token
from safety_lens.probes.reading import ConceptActivations, Sides

SPLITS = ("train", "val", "test")
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}w90 {{ m['content'] }} w91 {% elif m['role'] == 'user' %}"
    "w92 {{ m['content'] }} w93 {% else %}w94 {{ m['content'] }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w94 w95{% endif %}"
)
HOOKS = tuple(f"blocks.{layer}.hook_resid_{part}" for layer in range(4) for part in ("pre", "mid", "post"))

Gaps = Mapping[str, float] | float
Draw = Callable[[str, str, int], tuple[Tensor, Tensor]]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The zoo's word-level tokenizer with a chat template made of words."""
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def words(generator: torch.Generator, n: int, low: int = 10, high: int = 80) -> str:
    return " ".join(f"w{i}" for i in torch.randint(low, high, (n,), generator=generator).tolist())


def concept(
    sides: Callable[[torch.Generator], tuple[object, object]],
    *,
    n: Mapping[str, int] | None = None,
    templates: Sequence[str | None] = (None,),
    seed: int = 0,
    name: str = "joy",
    raw: bool = False,
) -> Concept:
    """A concept whose pairs are drawn by a function; pair i of each split has template i modulo their number."""
    generator = torch.Generator().manual_seed(seed)
    counts = n or {"train": 24, "val": 16, "test": 24}
    splits = {
        split: tuple(
            ContrastPair(*sides(generator), template=templates[i % len(templates)])  # type: ignore[arg-type]
            for i in range(counts.get(split, 0))
        )
        for split in SPLITS
    }
    return Concept(name=name, **splits, source="drawn", sha256="0" * 64, raw=raw)  # type: ignore[arg-type]


def activations(
    draw: Draw,
    *,
    hooks: Sequence[str] = HOOKS,
    n: Mapping[str, int] | None = None,
    templates: Sequence[str | None] = (None,),
    seed: int = 0,
) -> ConceptActivations:
    """Activations drawn by `draw(split, hook, pairs)`; the prompts are random words of equal length on both sides."""
    made = concept(lambda g: (words(g, 5), words(g, 5)), n=n, templates=templates, seed=seed)
    groups = {split: tuple(p.template for p in getattr(made, split)) for split in SPLITS}
    sides = {
        split: {hook: Sides(*draw(split, hook, len(groups[split])), groups[split]) for hook in hooks}
        for split in SPLITS
    }
    generator = torch.Generator().manual_seed(seed + 1)
    embedding = {
        split: Sides(*torch.randn(2, len(g), 8, generator=generator).unbind(), g) for split, g in groups.items()
    }
    length = {
        split: Sides(torch.full((len(g), 1), 5.0), torch.full((len(g), 1), 5.0), g) for split, g in groups.items()
    }
    return ConceptActivations(made, last_token, tuple(hooks), sides, embedding, length)


def gaussian(seed: int, gaps: Gaps = 0.0, d: int = 16) -> Draw:
    """Standard normal activations whose means differ by `gaps` (one for all hooks, or by hook) along the first axis."""
    generator = torch.Generator().manual_seed(seed)

    def draw(split: str, hook: str, n: int) -> tuple[Tensor, Tensor]:
        pos, neg = torch.randn(2, n, d, generator=generator).unbind()
        pos[:, 0] += gaps if isinstance(gaps, float) else gaps.get(hook, 0.0)
        return pos, neg

    return draw
