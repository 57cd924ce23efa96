"""Scorers: what a model said, as numbers.

A scorer takes completions and returns one number each. Those that could be wrong without a sign (a classifier whose
labels are swapped, refusal tokens of another model) test themselves when they are made, and fail there. Public names
are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety_lens.interventions.scorers.answers import answer_probability as answer_probability
    from safety_lens.interventions.scorers.beliefs import AgreementReader as AgreementReader
    from safety_lens.interventions.scorers.beliefs import FalsehoodReader as FalsehoodReader
    from safety_lens.interventions.scorers.classifier import ClassifierScorer as ClassifierScorer
    from safety_lens.interventions.scorers.completion import Completion as Completion
    from safety_lens.interventions.scorers.completion import Scorer as Scorer
    from safety_lens.interventions.scorers.concordance import agreement as agreement
    from safety_lens.interventions.scorers.hedging import HedgingReader as HedgingReader
    from safety_lens.interventions.scorers.lexicon import LexiconScorer as LexiconScorer
    from safety_lens.interventions.scorers.named import scorer_named as scorer_named
    from safety_lens.interventions.scorers.patterns import CallableScorer as CallableScorer
    from safety_lens.interventions.scorers.patterns import PatternScorer as PatternScorer
    from safety_lens.interventions.scorers.refusal import SubstringRefusal as SubstringRefusal
    from safety_lens.interventions.scorers.refusal_tokens import LogOddsRefusal as LogOddsRefusal
    from safety_lens.interventions.scorers.refusal_tokens import RefusalTokens as RefusalTokens
    from safety_lens.interventions.scorers.refusal_tokens import derive_refusal_tokens as derive_refusal_tokens

_HOMES = {
    "answers": ("answer_probability",),
    "beliefs": ("AgreementReader", "FalsehoodReader"),
    "classifier": ("ClassifierScorer",),
    "completion": ("Completion", "Scorer"),
    "concordance": ("agreement",),
    "hedging": ("HedgingReader",),
    "lexicon": ("LexiconScorer",),
    "named": ("scorer_named",),
    "patterns": ("CallableScorer", "PatternScorer"),
    "refusal": ("SubstringRefusal",),
    "refusal_tokens": ("LogOddsRefusal", "RefusalTokens", "derive_refusal_tokens"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'safety_lens.interventions.scorers' has no attribute {name!r}")
    return getattr(import_module(f"safety_lens.interventions.scorers.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
