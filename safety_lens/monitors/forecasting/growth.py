"""The closed form: how the KL from safe answers grows along a planned update, to fourth order, and where that holds.

The optimiser's path is δ(t) = −t·u + ½t²·w with t = Σ learning rates, u its first direction and w the change of that
direction along the path. With p_n = ⟨g_n, u⟩ and q_n = ⟨g_n, w⟩ over safe answers,

    ½ δᵀFδ = c2·t² + c3·t³ + c4·t⁴,   c2 = ½ mean p²,  c3 = −½ mean pq,  c4 = ⅛ mean q²,

which to second order in δ is the mean KL per token in nats. The loss of the safe answers also has c1·t = −t·⟨ḡ, u⟩;
the KL has no such term, for it is stationary where nothing has moved. All of it is plain arithmetic on a few numbers
per safety example; nothing here knows a model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from safety_lens.errors import DataError
from safety_lens.stats import Interval

NAN = float("nan")
KAPPA = 0.5
"""The second-order part of the path may be this share of the first-order part."""
NEVER = float("inf")


@dataclass(frozen=True, eq=False)
class Moments:
    """What every safety example says about the two parts of the path, means over the tokens of its answer.

    uu, uw, ww: (co)variance of the changes of its log-probabilities along u and w, nats² per t², t³, t⁴.
    slope: of its loss along −u, nats per t.
    """

    uu: Float[np.ndarray, " n"]
    uw: Float[np.ndarray, " n"]
    ww: Float[np.ndarray, " n"]
    slope: Float[np.ndarray, " n"]

    @classmethod
    def of_products(cls, p: Float[np.ndarray, " n"], q: Float[np.ndarray, " n"]) -> "Moments":
        """From the products ⟨g_n, u⟩ and ⟨g_n, w⟩ of gradients whose second moment is the Fisher information."""
        return cls(p * p, p * q, q * q, -p)

    def drawn(self, index: Float[np.ndarray, " n"] | np.ndarray) -> "Moments":
        """Those of the examples with these numbers."""
        return Moments(self.uu[index], self.uw[index], self.ww[index], self.slope[index])

    @property
    def polynomial(self) -> "Polynomial":
        return Polynomial(
            float(self.slope.mean()),
            float(0.5 * self.uu.mean()),
            float(-0.5 * self.uw.mean()),
            float(0.125 * self.ww.mean()),
        )


@dataclass(frozen=True)
class Polynomial:
    """c2·t² + c3·t³ + c4·t⁴ nats per token, never below 0. c1: slope of the loss of the safe answers, nats per t."""

    c1: float
    c2: float
    c3: float
    c4: float

    def __call__(self, t: Float[np.ndarray, " step"]) -> Float[np.ndarray, " step"]:
        found: Float[np.ndarray, " step"] = t**2 * (self.c2 + t * (self.c3 + t * self.c4))
        kl: Float[np.ndarray, " step"] = np.maximum(found, 0.0)
        return kl

    def reaches(self, level: float) -> float:
        """The smallest t > 0 at which the KL is `level`; infinity where it never is.

        Raises:
            DataError: a level that is not above 0.
        """
        if not level > 0:
            raise DataError(f"a KL to be reached must be above 0, got {level}")
        scale = max(abs(self.c2), abs(self.c3), abs(self.c4))
        if scale == 0:
            return NEVER
        unit = (level / scale) ** 0.25  # roots of a polynomial with coefficients around 1 are well conditioned
        coefficients = [self.c4 * unit**4, self.c3 * unit**3, self.c2 * unit**2, 0.0, -level]
        roots = np.roots(np.trim_zeros(np.array(coefficients) / level, "f"))
        real = roots[(np.abs(roots.imag) < 1e-7 * np.maximum(1.0, np.abs(roots.real))) & (roots.real > 0)].real
        return float(real.min() * unit) if len(real) else NEVER

    def shares(self, t: float) -> dict[str, float]:
        """Each term's part of the KL at t; c3 may be negative. NaN where the KL is 0."""
        whole = float(self(np.array([t]))[0])
        terms = {"c2": self.c2 * t**2, "c3": self.c3 * t**3, "c4": self.c4 * t**4}
        return {name: term / whole if whole > 0 else NAN for name, term in terms.items()}


def valid_until(u_norm: float, w_norm: float, kappa: float = KAPPA) -> float:
    """The t up to which ½t²‖w‖ ≤ κ·t‖u‖: beyond it the path is no longer known. Infinite for w = 0."""
    return NEVER if w_norm == 0 else 2 * kappa * u_norm / w_norm


@dataclass(frozen=True)
class Deviation:
    """How far a law was off on runs that were kept for this: mean and standard deviation over n runs of what had to be
    added to its parameter for it to reach the limit at the measured step. The parameter's own value is 0.
    """

    mean: float
    sd: float
    n: int

    def drawn(self, rng: np.random.Generator, size: int) -> Float[np.ndarray, " size"]:
        """Deviations that a further run may have: Student's t, n − 1 degrees of freedom, spread by √(1 + 1/n)."""
        found: Float[np.ndarray, " size"] = self.mean + self.sd * np.sqrt(1 + 1 / self.n) * rng.standard_t(
            self.n - 1, size
        )
        return found


CLOSED_OFF = Deviation(0.56, 0.15, 8)
"""Of the closed form: log of the forecast over the measured t at a KL of 0.1, on the organism
(`benchmarks/forecast.py --pilot`).
"""


@dataclass(frozen=True, eq=False)
class Curve:
    """A forecast of the KL per token after every step 1 … n with its 95 % band, and when it reaches the limit.

    The band and the interval of `reaches` hold the draw of safe answers and the error of the law, the latter as it was
    on runs of the organism. reaches: step (interpolated); infinity: not within any step that was looked at. valid: the
    last step for which the method claims anything. taken: steps taken for real, from which the rest is extrapolated; 0
    for a closed form.
    """

    steps: Float[np.ndarray, " step"]
    kl: Float[np.ndarray, " step"]
    low: Float[np.ndarray, " step"]
    high: Float[np.ndarray, " step"]
    reaches: Interval
    valid: float
    taken: int = 0

    @property
    def abstains(self) -> bool:
        """Whether the limit is not reached within the steps for which the method claims anything."""
        return not self.reaches.value <= self.valid

    @property
    def claims(self) -> str:
        """How far the method says that it knows, in words."""
        if self.taken:
            return f"extrapolated from {self.taken} steps"
        return f"to step {self.valid:.0f}" if self.valid < NEVER else "all steps looked at"

    def at(self, step: float | int) -> float:
        """KL after a step, interpolated on logarithms; NaN outside the curve."""
        return self._of(self.kl, step)

    def holds(self, step: float | int, kl: float) -> bool:
        """Whether a KL measured after a step lies within the band; False outside the curve."""
        return bool(self._of(self.low, step) <= kl <= self._of(self.high, step))

    def _of(self, kl: Float[np.ndarray, " step"], step: float | int) -> float:
        if not self.steps[0] <= step <= self.steps[-1]:
            return NAN
        known = np.log(np.maximum(kl, 1e-300))
        return float(np.exp(np.interp(np.log(step), np.log(self.steps), known)))


def banded(
    draw: Callable[[np.ndarray, float], Float[np.ndarray, " step"]],
    n: int,
    steps: Float[np.ndarray, " step"],
    limit: float,
    deviation: Deviation,
    *,
    valid: float = NEVER,
    taken: int = 0,
    repeats: int = 400,
    seed: int = 0,
) -> Curve:
    """The curve that `draw` gives for all examples and deviation 0, with percentile bands.

    Both vary in the bands: examples are resampled, and the law deviates as it did elsewhere. Where it erred to one side
    only, they are extended to the curve itself.

    draw: numbers of examples, deviation → KL after each of `steps`. Where a quantile of the step at which the limit is
    reached lies beyond the last step it is infinite.
    """
    rng = np.random.default_rng(seed)
    kl = draw(np.arange(n), 0.0)
    off = deviation.drawn(rng, repeats)
    found = np.stack([draw(rng.integers(0, n, n), float(each)) for each in off])
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    when, crossings = crossing(steps, kl, limit), np.array([crossing(steps, row, limit) for row in found])
    first, last = (float(x) for x in np.quantile(crossings, [0.025, 0.975], method="inverted_cdf"))
    reaches = Interval(when, min(first, when), max(last, when))
    return Curve(steps, kl, np.minimum(low, kl), np.maximum(high, kl), reaches, valid, taken)


def crossing(steps: Float[np.ndarray, " step"], kl: Float[np.ndarray, " step"], limit: float) -> float:
    """The first step at which a curve is at or above the limit, interpolated on logarithms; infinite if there is none.

    A curve that is above the limit at its first step crosses there.
    """
    above = np.flatnonzero(kl >= limit)
    if not len(above):
        return NEVER
    i = int(above[0])
    if i == 0 or kl[i - 1] <= 0:
        return float(steps[i])
    share = np.log(limit / kl[i - 1]) / np.log(kl[i] / kl[i - 1])
    return float(np.exp(np.log(steps[i - 1]) + share * np.log(steps[i] / steps[i - 1])))
