"""What a model is about to do, read from the logits of one answer token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.data import Encoded
from safety_lens.errors import DataError
from safety_lens.forced import Continuation, continuation_logprobs
from safety_lens.types import FwdHook

ReadLogits = Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, " row"]]
"""Function of the logits that choose an answer token: above 0 the behaviour is shown."""

PARTED = 0.5
"""Total variation between the sides' first-token distributions from which on they count as beginning differently."""
SHARED = 0.25
"""Mean probability on both sides from which on a token counts as a beginning that they share."""
COVERED = 0.99
LONGEST_PREFIX = 8


@dataclass(frozen=True)
class TokenLogOdds:
    """log P(ids) − log(1 − P(ids)) of the answer token behind `prefix`, in nats (Arditi et al. 2024, app. B).

    ids: token ids that stand for the behaviour. prefix: answer tokens that both sides begin with. distance: total
    variation in [0, 1] between the two sides' mean distributions of that token.
    """

    ids: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    distance: float = float("nan")

    def __call__(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
        inside = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        inside[list(self.ids)] = True
        wide = logits.double()  # the complement is summed on its own: 1 − P would lose everything near 1
        return wide[:, inside].logsumexp(-1) - wide[:, ~inside].logsumexp(-1)


def next_logprobs(
    model: HookedTransformer,
    prompts: Sequence[Encoded],
    *,
    prefix: Sequence[int] = (),
    hooks: Sequence[FwdHook] = (),
    batch_size: int | str = "auto",
) -> Float[Tensor, "prompt d_vocab"]:
    """Log-probabilities (nats, CPU) of the token behind each prompt and a forced beginning of its answer."""
    rows = [Continuation(tuple(e.ids), (*prefix, 0)) for e in prompts]  # the last token is predicted, never read
    return torch.stack([row[-1] for row in continuation_logprobs(model, rows, hooks=hooks, batch_size=batch_size)])


def derive_log_odds(
    model: HookedTransformer,
    positive: Sequence[Encoded],
    negative: Sequence[Encoded],
    *,
    batch_size: int | str = "auto",
) -> TokenLogOdds:
    """The tokens by which the answers to the positive prompts can be told from those to the negative ones.

    Where both sides may begin with the same token, it is forced and the next one is looked at too; the token at which
    the sides' mean distributions lie farthest apart is read. The ids are the fewest that hold 99 % of that distance:
    those that the positive side prefers.

    Raises:
        DataError: the answers do not part at one of the first tokens, so a behaviour must be handed in.
    """
    best, prefix = TokenLogOdds((), (), 0.0), tuple[int, ...]()
    while len(prefix) <= LONGEST_PREFIX and best.distance < COVERED:
        pos, neg = (
            next_logprobs(model, side, prefix=prefix, batch_size=batch_size).double().exp().mean(0)
            for side in (positive, negative)
        )
        gap = (pos - neg).clamp(min=0.0)
        if float(gap.sum()) > best.distance:
            best = TokenLogOdds(_most_of(gap), prefix, float(gap.sum()))
        both = torch.minimum(pos, neg)
        if float(both.max()) < SHARED:
            break
        prefix = (*prefix, int(both.argmax()))
    if best.distance < PARTED:
        raise DataError(
            "the answers to the positive and the negative prompts do not part at one of their first tokens (largest"
            f" total variation {best.distance:.2f}, needed {PARTED}); hand in behaviour=, a function of the next"
            " token's logits, or select by separability"
        )
    return best


def _most_of(gap: Float[Tensor, " d_vocab"]) -> tuple[int, ...]:
    """The fewest entries that hold `COVERED` of the sum; entries equal to the last of them come along."""
    sizes = gap.sort(descending=True).values
    enough = int((sizes.cumsum(0) < COVERED * gap.sum()).sum())
    return tuple(torch.nonzero(gap >= sizes[min(enough, len(sizes) - 1)]).flatten().tolist())
