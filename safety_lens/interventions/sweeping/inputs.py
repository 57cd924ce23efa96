"""What a user hands a sweep, checked and put into shape."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from safety_lens.data.pairs import frozen_prompt, last_user_text
from safety_lens.errors import DataError
from safety_lens.interventions.sweeping.plan import COEFFS, SPLITS, Controls, Directions, Site, SweepPrompt
from safety_lens.probes.directions import Direction
from safety_lens.probes.extract import DirectionSet
from safety_lens.types import Prompt


def checked_coeffs(coeffs: Sequence[float] | None, units: str) -> tuple[float, ...]:
    """The grid in rising order, 0 included.

    Raises:
        DataError: a number that is not finite, nothing but 0, or an unknown unit.
    """
    if units not in COEFFS:
        raise DataError(f"units {units!r}: choose {' or '.join(COEFFS)}")
    wanted = COEFFS[units] if coeffs is None else tuple(float(c) for c in coeffs)
    if bad := [c for c in wanted if not isfinite(c)]:
        raise DataError(f"coefficients must be finite numbers, got {bad[0]}")
    grid = tuple(sorted({0.0, *wanted}))
    if len(grid) < 2:
        raise DataError("a sweep needs a coefficient other than 0")
    return grid


def sites_of(directions: Directions, hooks: Sequence[str] | None, together: bool) -> tuple[Site, ...]:
    """Each direction at its hook; of a set, all its hooks or those given; a single direction at every hook given.

    together: all hooks of a set are edited at once, as one site.

    Raises:
        DataError: no direction, the same direction twice at a hook, or a set without a direction at a hook given.
    """
    many = [directions] if isinstance(directions, Direction | DirectionSet) else list(directions)
    sites: list[Site] = []
    for one in many:
        if isinstance(one, DirectionSet):
            parts = tuple(one) if hooks is None else tuple(one[hook] for hook in hooks)
            subject = f"{one.concept}/{one.method}"
        else:
            parts = (one,) if hooks is None else tuple(replace(one, hook=hook) for hook in hooks)
            subject = f"{one.concept}/{one.method}"
        if not parts:
            raise DataError(f"{subject} has no direction at any hook: there is nothing to steer with")
        groups = [parts] if together and len(parts) > 1 else [(part,) for part in parts]
        chosen = one.choice.hook if isinstance(one, DirectionSet) and one.choice is not None else None
        for g in groups:
            name, favoured = (g[0].hook, g[0].hook == chosen) if len(g) == 1 else (f"{len(g)} hooks together", False)
            sites.append(Site(subject, name, g, favoured=favoured))
    if not sites:
        raise DataError("no direction was given: there is nothing to steer with")
    names = [(s.subject, s.name) for s in sites]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{twice[0][0]} at {twice[0][1]} was given twice")
    return tuple(sites)


def with_shuffled(sites: Sequence[Site], refits: Sequence[Mapping[str, Direction]]) -> tuple[Site, ...]:
    """The sites with their shuffled-label controls, at the length of the direction they stand against.

    A refit that has no direction at a hook of a site is left out there.
    """
    out = []
    for site in sites:
        usable = [refit for refit in refits if all(part.hook in refit for part in site.parts)]
        scaled = [tuple(_as_long(refit[part.hook], part) for part in site.parts) for refit in usable]
        out.append(replace(site, shuffled=tuple(scaled)))
    return tuple(out)


def _as_long(direction: Direction, like: Direction) -> Direction:
    return replace(direction, vector=(direction.vector.double() * (like.norm / direction.norm)).to(like.vector))


def checked_prompts(
    prompts: Sequence[Prompt | SweepPrompt], trained_on: Sequence[Prompt] = (), chosen_on: Sequence[Prompt] = ()
) -> tuple[SweepPrompt, ...]:
    """Prompts with their roles, no text in two of them, none that the direction was fitted on.

    chosen_on: texts of the pairs that chose a hook at extraction: they may select again, not test.

    Two conversations are the same prompt where their last user turns are, whatever their system prompts.

    Raises:
        DataError: no test prompt, an empty one, or one that overlaps; the message quotes it.
    """
    out = [p if isinstance(p, SweepPrompt) else SweepPrompt(p) for p in prompts]
    out = [replace(p, prompt=frozen_prompt(p.prompt)) for p in out]
    if not any(p.split == "test" for p in out):
        raise DataError("a sweep needs test prompts: what selection prompts show is not a result")
    chosen = {_same(prompt) for prompt in chosen_on}
    seen = {_same(prompt): "a pair that the direction was fitted on" for prompt in trained_on}
    for number, p in enumerate(out):
        key = _same(p.prompt)
        if not key:
            raise DataError(f"prompt {number} of the sweep is empty")
        if p.split not in SPLITS:
            raise DataError(f"prompt {number} has the split {p.split!r}: choose {' or '.join(SPLITS)}")
        if key in seen:
            raise DataError(
                f"the {p.split} prompt {last_user_text(p.prompt)!r} is also {seen[key]}: direction, selection and test"
                " prompts must be different texts"
            )
        if p.split == "test" and key in chosen:
            raise DataError(
                f"the test prompt {last_user_text(p.prompt)!r} is also in a pair that the hook was chosen on:"
                " direction, selection and test prompts must be different texts"
            )
        seen[key] = f"a {p.split} prompt"
    return tuple(out)


def _same(prompt: Prompt) -> str:
    return " ".join(last_user_text(prompt).casefold().split())


def checked_seeds(seeds: Sequence[int], temperature: float) -> tuple[int, ...]:
    """Sampling seeds, none twice.

    Raises:
        DataError: none, one twice, or several at temperature 0, where all give the same text.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise DataError(f"a sweep needs one or more different seeds, got {list(seeds)}")
    if temperature == 0 and len(seeds) > 1:
        raise DataError(
            f"{len(seeds)} seeds at temperature 0 give {len(seeds)} times the same text: sample (temperature above 0),"
            " or use one seed"
        )
    return tuple(seeds)


def checked_controls(controls: Controls, coeffs: Sequence[float]) -> Controls:
    """Controls whose coefficients are on the grid.

    Raises:
        DataError: they are not, or a negative number.
    """
    if controls.random < 0 or (controls.seeds is not None and controls.seeds < 1):
        raise DataError(f"controls need 0 or more directions and 1 or more seeds, got {controls}")
    if controls.coeffs is None:
        return controls
    if outside := sorted(set(controls.coeffs) - set(coeffs)):
        raise DataError(f"control coefficient {outside[0]:g} is not on the grid {', '.join(f'{c:g}' for c in coeffs)}")
    return replace(controls, coeffs=tuple(sorted(set(controls.coeffs) - {0.0})))
