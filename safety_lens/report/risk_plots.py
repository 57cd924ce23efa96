"""Figures of a forecast: where safe answers are sensitive, what is forecast when, and how it compares with the run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from safety_lens.log import Measurement
from safety_lens.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = {"closed_form": (BLUE, "-"), "rehearsal": (ORANGE, "-"), "rehearsal_fitted": (PURPLE, "--")}
NAMES = {
    "closed_form": "closed form",
    "rehearsal": "rehearsal, extrapolated: quartic",
    "rehearsal_fitted": "rehearsal, extrapolated: fitted power law",
}


class Forecast(NamedTuple):
    """A curve to be drawn: steps, KL per token, its band (answers and law), and the last step that it claims anything
    for.
    """

    steps: Float[np.ndarray, " step"]
    kl: Float[np.ndarray, " step"]
    low: Float[np.ndarray, " step"]
    high: Float[np.ndarray, " step"]
    valid: float


def forecast_figure(
    curves: Mapping[str, Forecast],
    *,
    limit: float,
    planned: int,
    rehearsed: Sequence[Measurement] = (),
    measured: tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]] | None = None,
    title: str = "",
) -> "Figure":
    """KL per token on safe answers against the step, both logarithmic: forecasts with bands, and what was measured.

    Beyond the range of the closed form its curve is thin and dotted. rehearsed: the KL that the rehearsal measured.
    measured: steps and KL of the run itself.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.subplots()
    for name, c in curves.items():
        color, style = STYLES.get(name, (GREEN, "-"))
        known = c.steps <= min(c.valid, c.steps[-1])
        axes.plot(c.steps[known], c.kl[known], style, color=color, label=NAMES.get(name, name), lw=1.8)
        if not known.all():
            axes.plot(c.steps[~known], c.kl[~known], ":", color=color, lw=1, label="… beyond its range")
        axes.fill_between(c.steps, c.low, c.high, color=color, alpha=0.15, lw=0)
    if rehearsed:
        x = [r.step for r in rehearsed if r.step]
        axes.plot(x, [r.value for r in rehearsed if r.step], "s", color=ORANGE, ms=5, label="rehearsed, measured")
    if measured is not None:
        axes.plot(*measured, "o-", color="black", ms=4, lw=1, label="the run, measured", zorder=5)
    axes.axhline(limit, color=GREY, lw=1, ls="--")
    axes.axvline(planned, color=GREY, lw=1, ls=":")
    axes.annotate(f"limit {limit:g}", (1.02, limit), xytext=(0, 3), textcoords="offset points", fontsize=8, color=GREY)
    axes.annotate("end of the plan", (planned, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
                  color=GREY, ha="right")  # fmt: skip
    positive = [c.kl[c.kl > 0] for c in curves.values()]
    if any(len(p) for p in positive):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.3 * min(p.min() for p in positive if len(p)), top=max(10 * limit, 3.0))
    axes.set(xscale="log", xlabel="optimizer step", ylabel="KL per token on safe answers (nats)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    bands = "bands: 95 %, answers and error of the law"
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, title=bands, title_fontsize=8)
    return figure


def sensitivity_figure(rows: Sequence[Measurement], title: str = "") -> "Figure":
    """Layers × kinds of matrices: how sensitive safe answers are there, and how much the first update uses that.

    rows: of subject "risk/sensitivity". Shares of the sum over all matrices; white where nothing is trained.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.split for row in rows if row.split))
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    layers = sorted({int(name.split(".")[1]) for name in names})
    figure = Figure(figsize=(2.6 + 1.1 * len(kinds), 1.6 + 0.32 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = (("fisher_trace", "sensitivity"), ("update_energy", "planned update"))
    for axes, (metric, label) in zip(panels, labels, strict=True):
        grid = np.full((len(layers), len(kinds)), np.nan)
        for row in rows:
            if row.metric == metric and row.split:
                grid[layers.index(int(row.split.split(".")[1])), kinds.index(row.split.rpartition(".")[2])] = row.value
        total = np.nansum(grid)
        image = axes.imshow(100 * grid / total if total > 0 else grid, cmap="viridis", vmin=0, aspect="auto")
        axes.set_xticks(range(len(kinds)), kinds, rotation=45, fontsize=8)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
        axes.set_title(f"{label} (% of all)", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8)
    panels[0].set_ylabel("layer")
    figure.suptitle(title, fontsize=10)
    return figure


def spectrum_figure(
    eigenvalues: Float[np.ndarray, " rank"], total: float, dimension: int, n: int, title: str = ""
) -> "Figure":
    """Eigenvalues of the Fisher information, beside what white noise of the same trace would give.

    Chance: n independent directions in `dimension` have eigenvalues between (trace/n)(1 ± √(n/dimension))²
    (Marchenko & Pastur 1967). total: the trace. n: safety examples.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(eigenvalues) + 1), eigenvalues, "o-", color=BLUE, ms=4, label="safe answers")
    spread = np.sqrt(n / dimension)
    low, high = (total / n * (1 + sign * spread) ** 2 for sign in (-1, 1))
    axes.axhspan(low, high, color=GREY, alpha=0.35, lw=1, label="white noise of the same trace")
    axes.set(yscale="log", xlabel="direction", ylabel="eigenvalue of F (nats per unit²)")
    axes.set_title(
        f"{title}\n{len(eigenvalues)} directions hold {100 * eigenvalues.sum() / total:.0f} % of the trace".strip(),
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


def row_risk_figure(risk: Float[np.ndarray, " n"], title: str = "") -> "Figure":
    """Histogram of the rows' risk; above 0: away from safe answers. Unknown rows are counted."""
    from matplotlib.figure import Figure

    known = risk[np.isfinite(risk)]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    edges = np.histogram_bin_edges(known, bins=30) if len(known) else np.linspace(-1, 1, 31)
    axes.hist(
        known[known <= 0], edges.tolist(), color=BLUE, alpha=0.7, label=f"towards safe answers ({(known <= 0).sum()})"
    )
    axes.hist(known[known > 0], edges.tolist(), color=ORANGE, alpha=0.7, label=f"away from them ({(known > 0).sum()})")
    axes.axvline(0, color="black", lw=0.8)
    unknown = f"; {len(risk) - len(known)} rows unknown" if len(known) < len(risk) else ""
    axes.set(xlabel="risk of a row (cosine of its step with the loss of safe answers)", ylabel="rows")
    axes.set_title(f"{title}{unknown}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure
