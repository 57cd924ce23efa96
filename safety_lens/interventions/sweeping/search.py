"""The order of a sweep's answers: the whole grid, or a search from coarse to fine whose test prompts report one site.

A grid over many blocks answers every prompt thousands of times. The search looks first at a few blocks at the middle
strength of either sign, then between them and at other strengths, all on the selection prompts. The test prompts run
at the chosen site alone, with the controls at the chosen coefficient. Each step depends on the answers stored before
it and on nothing else, so that a sweep that was cut off takes the same way.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from safety_lens.errors import DataError
from safety_lens.interventions.sweeping.choice import Grid, out_of_reach, ranked
from safety_lens.interventions.sweeping.plan import Arm, Cell, Controls, Plan, Site, SweepPrompt

COARSE_SITES = 6
"""Sites of each direction that the search begins with, evenly spaced; a grid of no more sites is run whole."""
SEARCHES = ("auto", "grid", "coarse")
LEAST_CONTROLS, LEAST_SELECTION = 20, 12
"""Random directions and selection prompts below which a remark is made."""

Step = Callable[[Grid], list[Cell]]
"""The cells that come next, given the answers of the steps before."""


def resolved(search: str, n_sites: int, prompts: Sequence[SweepPrompt], controls: Controls) -> str:
    """The kind of search that "auto" stands for: "coarse" over many sites with selection prompts, else "grid".

    Args:
        n_sites: Sites of the direction that has most.

    Raises:
        DataError: an unknown word, or "coarse" where nothing can choose or the controls name coefficients.
    """
    if search not in SEARCHES:
        raise DataError(f"search {search!r}: choose {', '.join(SEARCHES)}")
    chooses = any(p.split == "selection" for p in prompts)
    if search == "coarse" and not chooses:
        raise DataError("a search from coarse to fine needs selection prompts, and there are none: use the grid")
    if search == "coarse" and controls.coeffs is not None:
        raise DataError("a search from coarse to fine runs its controls at the coefficient that it chooses: name none")
    if search != "auto":
        return search
    return "coarse" if n_sites > COARSE_SITES and chooses and controls.coeffs is None else "grid"


def most_sites(sites: Sequence[Site]) -> int:
    """Sites of the direction that has most."""
    return max(Counter(site.subject for site in sites).values())


def steps(plan: Plan) -> dict[str, Step]:
    """The steps of a sweep in order, by name."""
    first: dict[str, Step] = {"unsteered answers": _unsteered}
    if plan.search == "grid":
        return first | {"steered answers": _whole}
    return first | {
        "search over depth": _coarse,
        "search at another strength": _other_strength,
        "search between": _between,
        "search over strength": _strengths,
        "test prompts and controls at the chosen site": _report,
    }


def _unsteered(grid: Grid) -> list[Cell]:
    return grid.plan.cells(grid.plan.unsteered)


def _whole(grid: Grid) -> list[Cell]:
    return grid.plan.cells(grid.plan.arms[len(grid.plan.unsteered) :])


def _coarse(grid: Grid) -> list[Cell]:
    if out_of_reach(grid):
        return []
    at = middle(grid.coeffs)
    return _selecting(
        grid, [Arm("steer", i, c) for s in _subjects(grid) for i in coarse_sites(grid.plan, s) for c in at]
    )


def _other_strength(grid: Grid) -> list[Cell]:
    """For directions without a best cell: the strongest coefficients, or weaker ones where most exceed the limits."""
    arms = []
    for subject in _subjects(grid):
        found = ranked(grid, subject)
        if not found.effects or found.best is not None:
            continue
        too_much = 2 * len(found.allowed) < len(found.effects)
        at = [side[max(len(side) // 2 - 1, 0)] if too_much else side[-1] for side in _sides(grid.coeffs)]
        arms += [Arm("steer", i, c) for i in dict.fromkeys(arm.site for arm in found.effects) for c in at]
    return _selecting(grid, arms)


def _between(grid: Grid) -> list[Cell]:
    """The sites halfway to the neighbours of the best one, at its coefficient."""
    arms = []
    for subject, best in _found_at_first(grid):
        tried = sorted({arm.site for arm in grid.steered(subject, "selection")})
        sites = [i for i, site in enumerate(grid.plan.sites) if site.subject == subject]
        ends = [sites[0] - 1, *tried, sites[-1] + 1]
        place = ends.index(best.site)
        halves = {(best.site + other) // 2 for other in (ends[place - 1], ends[place + 1])}
        arms += [Arm("steer", i, best.coeff) for i in sorted(halves & set(sites))]
    return _selecting(grid, arms)


def _strengths(grid: Grid) -> list[Cell]:
    """All coefficients of the best one's sign at its site."""
    return _selecting(
        grid,
        [Arm("steer", a.site, c) for _, a in _found_at_first(grid) for c in grid.coeffs if c * a.coeff > 0],
    )


def _report(grid: Grid) -> list[Cell]:
    """The chosen site on the test prompts, at every coefficient of the chosen sign that was tried, and the mirrored."""
    arms, controls = [], []
    for subject in _subjects(grid):
        best = ranked(grid, subject).best
        if best is None:
            continue
        tried = {a.coeff for a in grid.steered(subject, "selection") if a.site == best.site}
        at = [c for c in grid.coeffs if (c in tried and c * best.coeff > 0) or c == -best.coeff]
        arms += [Arm("steer", best.site, c) for c in at]
        controls += grid.plan.controls_at(best.site, [best.coeff])
    return grid.plan.cells([*arms, *controls], ["test"])


def _subjects(grid: Grid) -> list[str]:
    return list(dict.fromkeys(site.subject for site in grid.plan.sites))


def _found_at_first(grid: Grid) -> list[tuple[str, Arm]]:
    """The directions that the first strengths found a cell for, with the best one; the others had a second round."""
    first, out = set(middle(grid.coeffs)), []
    for subject in _subjects(grid):
        best, coarse = ranked(grid, subject).best, coarse_sites(grid.plan, subject)
        others = [a for a in grid.steered(subject, "selection") if a.coeff not in first]
        if best is not None and not {a.site for a in others} >= set(coarse):
            out.append((subject, best))
    return out


def _selecting(grid: Grid, arms: Sequence[Arm]) -> list[Cell]:
    """Cells of those arms that did not run on the selection prompts yet."""
    return grid.plan.cells([arm for arm in arms if not grid.ran(arm, "selection")], ["selection"])


def coarse_sites(plan: Plan, subject: str) -> list[int]:
    """Numbers of the sites that the search begins with: evenly spaced, one of them the site that extraction chose."""
    sites = [i for i, site in enumerate(plan.sites) if site.subject == subject]
    if len(sites) <= COARSE_SITES:
        return sites
    places = [sites[round((k + 1) / (COARSE_SITES + 1) * (len(sites) - 1))] for k in range(COARSE_SITES)]
    for own in (i for i in sites if plan.sites[i].favoured):
        places[min(range(COARSE_SITES), key=lambda k: abs(places[k] - own))] = own
    return places


def middle(coeffs: Sequence[float]) -> list[float]:
    """The middle coefficient of either sign by size, the larger of two."""
    return [side[len(side) // 2] for side in _sides(coeffs)]


def _sides(coeffs: Sequence[float]) -> list[list[float]]:
    """Coefficients below and above 0, each by rising size; without a side that has none."""
    sides = [sorted((c for c in coeffs if c * sign > 0), key=abs) for sign in (-1, 1)]
    return [side for side in sides if side]


class Size(NamedTuple):
    """Number of answers of a sweep, the most there can be. cells: whose benign KL is measured."""

    unsteered: int
    system: int
    steered: int
    random: int
    shuffled: int
    cells: int

    @property
    def answers(self) -> int:
        return sum(self[:-1])


KINDS = ("baseline", "system", "steer", "random", "shuffled")
TITLES = ("unsteered", "with the system prompt", "steered", "of random directions", "of refits on shuffled labels")


def size(plan: Plan) -> Size:
    """Number of answers of a sweep; of a search from coarse to fine the most that it can come to."""
    counts = Counter(c.arm.kind for c in plan.cells(plan.arms)) if plan.search == "grid" else _most(plan)
    cells = counts.pop("cells", len(plan.sites) * sum(c != 0 for c in plan.coeffs))
    unsteered, system, steered, random, shuffled = (counts[kind] for kind in KINDS)
    return Size(unsteered, system, steered, random, shuffled, cells)


def _most(plan: Plan) -> Counter[str]:
    """The longer of two ways through the search: a cell found at the first strength, or at another one."""
    out = Counter(c.arm.kind for c in plan.cells(plan.unsteered))
    chosen, test = (len(plan.seeds) * sum(p.split == split for p in plan.prompts) for split in ("selection", "test"))
    sides = _sides(plan.coeffs)
    strengths, signs = max(map(len, sides)), len(sides)
    for subject in dict.fromkeys(site.subject for site in plan.sites):
        coarse = len(coarse_sites(plan, subject)) * signs
        other = coarse if strengths > 1 else 0
        finer, tested = 2 + strengths - 1, strengths + signs - 1
        ways = [(coarse + finer, tested), (coarse + other, min(strengths, 2) + signs - 1)]
        searched, reported = max(ways, key=lambda way: way[0] * chosen + way[1] * test)
        out["steer"] += searched * chosen + reported * test
        out["cells"] += searched + signs - 1
        site = next(i for i, s in enumerate(plan.sites) if s.subject == subject)
        for cell in plan.cells(plan.controls_at(site, [plan.coeffs[-1]])):
            out[cell.arm.kind] += 1
    return out


def describe(plan: Plan) -> str:
    """Number of answers by kind, and their length, in one line."""
    counts = size(plan)
    parts = [f"{n:,} {title}" for n, title in zip(counts, TITLES, strict=False) if n]
    most = "at most " if plan.search == "coarse" else ""
    what = f"{most}{counts.answers:,} answers of up to {plan.decoding.max_new_tokens} tokens: {', '.join(parts)}"
    cost = f"; then the KL of {counts.cells} cells on {len(plan.benign)} benign prompts" if plan.benign else ""
    return f"{what} ({len(plan.prompts)} prompts, {len(plan.sites)} sites, {counts.cells} cells){cost}"


def remarks(plan: Plan) -> list[str]:
    """Remarks on the kind of search, and on what so few controls and selection prompts can show."""
    out = []
    n, cells = plan.controls.random, size(plan).cells
    if plan.search == "coarse":
        first = [plan.sites[i].name for i in coarse_sites(plan, plan.sites[0].subject)]
        out.append(
            f"from coarse to fine: the selection prompts search {len(plan.sites)} sites, first {', '.join(first)}; the"
            " test prompts run at the chosen site alone (search grid: every cell on every prompt)"
        )
    if n < LEAST_CONTROLS:
        least = f"p of a cell against them is {1 / (n + 1):.2g} at least, and " if n else ""
        out.append(f"{n} random directions: {least}their range says little; use {LEAST_CONTROLS} or more")
    chosen = sum(p.split == "selection" for p in plan.prompts)
    if 0 < chosen < LEAST_SELECTION:
        out.append(
            f"{chosen} selection prompts choose among {cells} cells: with fewer than {LEAST_SELECTION} the choice"
            " is mostly noise"
        )
    return out
