"""How the next token is chosen: greedy or sampled, always one choice per row that its batch cannot change."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safety_lens.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy, else softmax(logits / temperature) is sampled.

    top_k: only the k most probable tokens (0: all). top_p: only the smallest set of most probable tokens that holds
    this probability (Holtzman et al. 2020, arXiv:1904.09751). repetition_penalty: logits of tokens that the prompt or
    the answer already holds are divided by it where positive, multiplied where negative (Keskar et al. 2019,
    arXiv:1909.05858). The order is that of Hugging Face's generate: penalty, temperature, top-k, top-p.

    Raises:
        DataError: a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1: off)"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1: off)"),
        )
        for name, value, fine, wanted in checks:
            if not fine or value == float("inf"):
                raise DataError(f"{name} must be {wanted}, got {value}")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0

    def choose(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        seen: Bool[Tensor, "batch d_vocab"] | None,
        streams: Sequence[torch.Generator],
    ) -> Int[Tensor, " batch"]:
        """The next token of each row, on the CPU. seen: tokens the row already holds, needed for a penalty alone."""
        logits = logits if logits.dtype == torch.float64 else logits.float()  # a penalty in bf16 would make ties
        if self.penalises and seen is not None:
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1).cpu()
        scaled = logits.double().cpu() / self.temperature
        if 0 < self.top_k < scaled.shape[1]:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if self.top_p < 1:
            scaled = _nucleus(scaled, self.top_p)
        # Inverse CDF with one uniform per row from the row's own stream: the same draw whatever the batch.
        cumulative = scaled.softmax(-1).cumsum(-1)
        draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in streams])
        picked = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).squeeze(1)
        # Rounding in the running sum must not pick a token beyond the last possible one.
        last = (cumulative < cumulative[:, -1:]).sum(-1)
        return torch.minimum(picked, last)


def _nucleus(scaled: Float[Tensor, "batch d_vocab"], top_p: float) -> Float[Tensor, "batch d_vocab"]:
    ordered, order = scaled.sort(descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(scaled, dtype=torch.bool).scatter(1, order, before >= top_p)
    return scaled.masked_fill(dropped, -torch.inf)
