"""The Fisher information of a set of safe answers: which changes of the weights the answers are sensitive to.

The Fisher matrix F = (1/m) Σ_n g_n g_nᵀ is never formed. Its non-zero eigenvalues are those of the Gram matrix
⟨g_i, g_j⟩/m, its trace is the Gram's, and the coefficient of an update U along its i-th direction
v_i = Σ_n u_in g_n / √(m λ_i) needs only the products ⟨g_n, U⟩.

Gradients are those of a loss whose second moment is the Fisher information of a token's distribution, so that
½·mean_n⟨g_n, U⟩² is, to second order, the mean KL per token (nats) between the model and the model moved by U.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from safety_lens.errors import DataError
from safety_lens.forced import Continuation
from safety_lens.probes.gradients import Loss, Predictions

Numbers = Float[np.ndarray, "..."]

# --- losses whose second moment is a Fisher information -------------------------------------------------------------


def empirical_nll(predictions: Predictions) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of the answer / √tokens: the empirical Fisher.

    Not the Fisher information: it takes the answers as if the model had drawn them, and where the loss is not at its
    minimum the mean gradient dominates it (Kunstner et al. 2019, arXiv:1905.12558). See `Gram.centred`.
    """
    nll = F.cross_entropy(predictions.logits, predictions.targets, reduction="none")
    return predictions.summed(nll) / _tokens(predictions).sqrt()


def sampled_nll(seed: int = 0) -> Loss:
    """The same of a token drawn from the model itself at every position of the answer: the true Fisher, unbiased.

    Every position draws its own token behind the given answer, so tokens of one example do not interact and the sum's
    second moment is the sum of theirs. The draws depend on the seed and the number of the example alone, not on what
    shares its batch.
    """

    def loss(predictions: Predictions) -> Float[Tensor, " batch"]:
        logp = predictions.logits.log_softmax(-1)
        nll = -logp.gather(-1, _drawn(logp.detach(), predictions, seed)[:, None])[:, 0]
        return predictions.summed(nll) / _tokens(predictions).sqrt()

    return loss


VARIANTS: dict[str, Callable[[int], Loss]] = {"sampled": sampled_nll, "empirical": lambda seed: empirical_nll}
"""Kinds of Fisher information by name, as functions of a seed. The exact one needs more rows: `exact_rows`."""


def _tokens(predictions: Predictions) -> Float[Tensor, " batch"]:
    return predictions.summed(torch.ones_like(predictions.logits[:, 0]).detach())


def _drawn(logp: Float[Tensor, "token d_vocab"], predictions: Predictions, seed: int) -> Int[Tensor, " token"]:
    """Inverse of the distribution function at uniform numbers: the same token wherever the row is computed."""
    counts = torch.bincount(predictions.row, minlength=len(predictions.examples)).tolist()
    streams = [np.random.default_rng([seed, n]) for n in predictions.examples.tolist()]
    uniform = np.concatenate([stream.random(count) for stream, count in zip(streams, counts, strict=True)])
    below = logp.double().exp().cumsum(-1)
    level = torch.as_tensor(uniform, device=below.device)[:, None] * below[:, -1:]
    return (below <= level).sum(-1).clamp(max=logp.shape[1] - 1)


MOST_ROWS = 200_000


def exact_rows(examples: Sequence[Continuation], d_vocab: int) -> tuple[list[Continuation], Loss]:
    """Examples and a loss whose gradients have exactly the Fisher information as their second moment.

    One row for each answer position and token of the vocabulary: diag(p) − ppᵀ = Σ_v p_v (e_v − p)(e_v − p)ᵀ. Nothing
    is drawn, and it costs answer tokens × vocabulary passes: for small models, and to judge the drawn one by.

    Raises:
        DataError: more than `MOST_ROWS` rows.
    """
    n = sum(len(example.tokens) for example in examples) * d_vocab
    if not 0 < n <= MOST_ROWS:
        raise DataError(f"the exact Fisher information needs {n} rows; it is for at most {MOST_ROWS}: use sampled_nll")
    rows, place = list[Continuation](), list[tuple[int, int, float]]()
    for example in examples:
        for at in range(len(example.tokens)):
            short = Continuation(example.prompt, example.tokens[: at + 1])
            weight = (n / (len(examples) * len(example.tokens))) ** 0.5
            rows += [short] * d_vocab
            place += [(at, token, weight) for token in range(d_vocab)]

    def loss(predictions: Predictions) -> Float[Tensor, " batch"]:
        logp = predictions.logits.log_softmax(-1)
        numbers = predictions.examples.tolist()
        ends = torch.bincount(predictions.row, minlength=len(numbers)).cumsum(0) - 1  # the position before its token
        token = torch.tensor([place[i][1] for i in numbers], device=logp.device)
        weight = torch.tensor([place[i][2] for i in numbers], device=logp.device, dtype=logp.dtype)
        score = logp[ends].gather(-1, token[:, None])[:, 0]
        return -weight * (score.detach() / 2).exp() * score  # ∇log p_v = J ᵀ(e_v − p)

    return rows, loss


# --- the Gram matrix and what follows from it ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gram:
    """⟨g_i, g_j⟩ of the gradients of n examples, float64.

    dimension: entries of one gradient. losses: of every example. is_centred: whether the mean gradient was taken out.
    """

    values: Float[np.ndarray, "n n"]
    dimension: int
    losses: Float[np.ndarray, " n"]
    is_centred: bool = False

    @property
    def trace(self) -> float:
        """tr F: the mean of ‖g_n‖², exactly, whatever rank is kept later."""
        return float(np.trace(self.values) / len(self.values))

    @property
    def mean_share(self) -> float:
        """‖ḡ‖² / tr F in [0, 1]: how much of the second moment is the mean gradient; 1/n for independent noise."""
        return float(self.values.mean() / self.trace) if self.trace > 0 else float("nan")

    def centred(self) -> "Gram":
        """The Gram matrix of g_n − ḡ: the covariance of the gradients instead of their second moment."""
        rows = self.values.mean(0)
        return Gram(self.values - rows - rows[:, None] + rows.mean(), self.dimension, self.losses, True)

    def spectrum(self, rank: int | None = None, *, method: str = "exact", seed: int = 0) -> "Spectrum":
        """The `rank` largest eigenvalues of F and their eigenvectors among the examples; default all above 0.

        method: "exact" or "randomised" (Halko et al. 2011, for thousands of examples).

        Raises:
            DataError: fewer independent gradients than `rank`, or another method.
        """
        if method not in METHODS:
            raise DataError(f"no way {method!r} to find eigenvalues; there are {', '.join(METHODS)}")
        n = len(self.values)
        if rank is not None and not 0 < rank <= n - self.is_centred:
            raise DataError(f"rank {rank} was asked of {n} safety examples: give more examples or a rank up to {n}")
        values, vectors = METHODS[method](self.values / n, rank or n, seed)
        kept = values > max(n * np.finfo(float).eps * self.trace, 0.0)
        if rank is not None and not kept.all():
            raise DataError(
                f"rank {rank} was asked, but the gradients of the {n} safety examples span {int(kept.sum())}"
                " dimensions: give more, and more different, examples"
            )
        return Spectrum(values[kept], vectors[:, kept], self.trace, self.dimension, self.is_centred)


def _exact(values: Float[np.ndarray, "n n"], rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    found, vectors = np.linalg.eigh(values)
    return found[::-1][:rank], vectors[:, ::-1][:, :rank]


def _randomised(values: Float[np.ndarray, "n n"], rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    start = np.random.default_rng(seed).standard_normal((len(values), min(rank + 10, len(values))))
    basis, _ = np.linalg.qr(values @ start)
    for _ in range(4):
        basis, _ = np.linalg.qr(values @ basis)
    found, vectors = np.linalg.eigh(basis.T @ values @ basis)
    return found[::-1][:rank], (basis @ vectors)[:, ::-1][:, :rank]


METHODS = {"exact": _exact, "randomised": _randomised}


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest eigenvalues λ_i of F, largest first, and eigenvectors u_i over the examples.

    total: tr F over all directions, kept or not. dimension: D, the entries of one gradient.
    """

    eigenvalues: Float[np.ndarray, " rank"]
    vectors: Float[np.ndarray, "n rank"]
    total: float
    dimension: int
    is_centred: bool = False

    def __len__(self) -> int:
        return len(self.eigenvalues)

    @property
    def explained(self) -> Float[np.ndarray, " rank"]:
        """Share of tr F that the first i directions hold: of all of it, not of the directions kept."""
        found: Numbers = self.eigenvalues.cumsum() / self.total
        return found

    def first(self, rank: int) -> "Spectrum":
        """The first `rank` directions."""
        return Spectrum(self.eigenvalues[:rank], self.vectors[:, :rank], self.total, self.dimension, self.is_centred)

    def explaining(self, share: float) -> "Spectrum":
        """The fewest directions that hold `share` of tr F.

        Raises:
            DataError: all directions kept hold less, or the share is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise DataError(f"a share of the Fisher trace lies in (0, 1], got {share}")
        enough = np.flatnonzero(self.explained >= share - 1e-12)
        if not len(enough):
            raise DataError(
                f"{len(self)} directions hold {self.explained[-1]:.3f} of the Fisher trace, {share} was asked: keep"
                " more"
            )
        return self.first(int(enough[0]) + 1)

    def coefficients(self, products: Float[np.ndarray, "*update n"]) -> Float[np.ndarray, "*update rank"]:
        """⟨v_i, U⟩ along every unit direction v_i, from the products ⟨g_n, U⟩ of the same examples."""
        products = products - products.mean(-1, keepdims=True) if self.is_centred else products
        found: Numbers = (products @ self.vectors) / np.sqrt(len(self.vectors) * self.eigenvalues)
        return found

    def overlap(self, products: Float[np.ndarray, " n"], squared_norm: float) -> "Overlap":
        """How much of an update lies in the span of these directions, beside what chance gives.

        squared_norm: ‖U‖² over the same matrices; 0 gives share 0, lift 0 and p 1.
        """
        k, d = len(self), self.dimension
        share = float((self.coefficients(products) ** 2).sum() / squared_norm) if squared_norm > 0 else 0.0
        p = float(stats.beta.sf(min(share, 1.0), k / 2, (d - k) / 2)) if 0 < k < d else float("nan")
        return Overlap(share, k / d, p)


@dataclass(frozen=True)
class Overlap:
    """share: ‖P U‖²/‖U‖² in [0, 1]. chance: its mean for a random direction, rank / dimension. p: one-sided, that a
    random direction (uniform on the sphere) overlaps as much; Beta(k/2, (D − k)/2).
    """

    share: float
    chance: float
    p: float

    @property
    def lift(self) -> float:
        """Share over chance: 1 for a random direction."""
        return self.share / self.chance


def energy(products: Float[np.ndarray, "*update n"]) -> Float[np.ndarray, "*update"]:
    """½·mean_n⟨g_n, U⟩²: the Fisher energy of an update, with `sampled_nll` an estimate of its KL per token in nats."""
    found: Numbers = 0.5 * (products**2).mean(-1)
    return found
