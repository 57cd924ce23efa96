"""Fits of either kind, read once and kept: which hooks, which tensors."""

from collections.abc import Sequence
from dataclasses import fields

from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.interventions.suppression.ancestor import AncestorFit, fit_ancestors
from safety_lens.interventions.suppression.auto import choose_hook
from safety_lens.interventions.suppression.cache import Kept, remembered
from safety_lens.interventions.suppression.data import UNNAMED, ArtifactPairs
from safety_lens.interventions.suppression.reading import HookFit, fit_hooks, site_hooks

READOUT = "readout"


def _tensors(fit: HookFit | AncestorFit) -> dict[str, Tensor]:
    return {f.name: getattr(fit, f.name) for f in fields(fit) if f.name not in ("hook", "category")}


def _keys(fits: Sequence[HookFit | AncestorFit]) -> dict[str, Tensor]:
    return {f"{at.category}|{at.hook}|{name}": t for at in fits for name, t in _tensors(at).items()}


def _grouped(kept: Kept) -> list[tuple[str, str, dict[str, Tensor]]]:
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in kept.tensors.items():
        category, hook, name = key.rsplit("|", 2)
        groups.setdefault((category, hook), {})[name] = tensor
    order = [tuple(entry) for entry in kept.facts["order"]]
    return [(category, hook, groups[category, hook]) for category, hook in order]


def _kept(fits: Sequence[HookFit | AncestorFit]) -> Kept:
    return Kept(_keys(fits), facts={"order": [[at.category, at.hook] for at in fits]})


def fitted(
    model: HookedTransformer,
    pairs: ArtifactPairs,
    *,
    site: str,
    layers: Sequence[int] | None,
    read: str,
    components: int,
    cache: bool,
) -> tuple[list[HookFit], HookFit]:
    """Fits at the hooks asked for (None: one, see `choose_hook`), and the readout: the last block's output.

    Raises:
        DataError: nothing to suppress at the hooks, or bad settings.
    """
    hooks = site_hooks(model, site, layers)
    readout = site_hooks(model, "resid", [-1])[0]
    everything = list(dict.fromkeys([*hooks, readout]))
    settings = {"hooks": everything, "read": read, "components": components}

    def work() -> Kept:
        return _kept(fit_hooks(model, pairs, everything, read=read, components=components))

    kept = remembered("suppression-fits", model, pairs, settings, work, cache=cache)
    fits = [HookFit(hook=hook, category=category, **tensors) for category, hook, tensors in _grouped(kept)]
    behind = next(at for at in fits if at.hook == readout and at.category == UNNAMED)
    asked = [at for at in fits if at.hook in hooks]
    chosen = hooks if layers is not None else [choose_hook(asked, model.cfg.n_layers)]
    return [at for at in asked if at.hook in chosen], behind


def fitted_ancestors(
    model: HookedTransformer,
    pairs: ArtifactPairs,
    *,
    site: str,
    layers: Sequence[int] | None,
    components: int,
    cache: bool,
) -> list[AncestorFit]:
    """The seed's fits on the fit pairs, at the layers asked for or those of its own rule."""
    hooks = site_hooks(model, site, layers)
    settings = {"hooks": hooks, "choose": layers is None, "components": components}

    def work() -> Kept:
        found = fit_ancestors(
            model, pairs.fit, hooks, choose_layers=layers is None, components=components, raw=pairs.raw
        )
        return _kept(found)

    kept = remembered("suppression-ancestor", model, pairs, settings, work, cache=cache)
    return [AncestorFit(hook=hook, category=category, **tensors) for category, hook, tensors in _grouped(kept)]
