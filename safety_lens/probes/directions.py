"""A direction: a raw vector at a hook, together with the evidence that it is one."""

from dataclasses import dataclass, field
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from safety_lens.stats import UNKNOWN, Interval

NAN = float("nan")


@dataclass(frozen=True)
class Evidence:
    """How well a direction separates pairs it was not fitted on, and what else would separate them as well.

    All AUROC values are in [0, 1]; NaN means "not measurable", with the reason in `notes`.

    auroc: on the reporting split; each pair is scored by a fit without pairs of its own template where templates recur.
    d_prime: standardised gap of the same scores. p: one-sided, swapping sides within pairs, whole templates together.
    p_max: the same, corrected for all hooks looked at (max-T). stability: mean cosine of directions from two halves of
    the fitting pairs.
    null_shuffled, null_random: AUROC that 95 % of refits on shuffled labels, and of random directions, stay below.
    lexical, bigram, length, embedding: AUROC of a bag of words, of words and bigrams, of the token count, and of mean
    token embeddings, on the same pairs. above_lexical: AUROC of the direction minus that of the bag of words.
    auroc_known_templates, lexical_known_templates: the easier figures, by fits that saw the templates; NaN where no
    template recurs.
    n: pairs in the reporting split. scheme: how pairs were held out. notes: what a reader must know.
    """

    auroc: Interval = UNKNOWN
    d_prime: Interval = UNKNOWN
    p: float = NAN
    p_max: float = NAN
    stability: float = NAN
    null_shuffled: float = NAN
    null_random: float = NAN
    lexical: Interval = UNKNOWN
    bigram: Interval = UNKNOWN
    length: Interval = UNKNOWN
    embedding: Interval = UNKNOWN
    above_lexical: Interval = UNKNOWN
    auroc_known_templates: Interval = UNKNOWN
    lexical_known_templates: Interval = UNKNOWN
    n: int = 0
    split: str = "test"
    scheme: str = "held-out split"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Direction:
    """A raw vector at a hook. Added, it is a steering vector.

    vector: [d], in activation units; its length is the gap between the class means along it.
    """

    concept: str
    hook: str
    vector: Float[Tensor, " d"]
    method: str
    evidence: Evidence | None = field(default=None, repr=False)

    @cached_property
    def norm(self) -> float:
        """Length of the vector, in activation units."""
        return float(self.vector.double().norm())

    @cached_property
    def unit(self) -> Float[Tensor, " d"]:
        """The vector at length 1."""
        return self.vector.div(self.vector.norm())

    @property
    def key(self) -> str:
        """Where an artifact keeps it: `<concept>/<method>/<hook name>`."""
        return f"{self.concept}/{self.method}/{self.hook}"

    def project(self, acts: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Signed length of each activation along the direction."""
        return acts @ self.unit.to(acts)
