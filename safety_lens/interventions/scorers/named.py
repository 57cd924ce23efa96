"""Scorers by what is typed at a command line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safety_lens.data.built_in import ENGLISH, SPLITS, built_in_for
from safety_lens.data.rows import Row
from safety_lens.errors import DataError
from safety_lens.interventions.scorers.beliefs import AgreementReader, FalsehoodReader
from safety_lens.interventions.scorers.completion import Scorer
from safety_lens.interventions.scorers.hedging import HedgingReader
from safety_lens.interventions.scorers.lexicon import lexicon
from safety_lens.interventions.scorers.patterns import PatternScorer
from safety_lens.interventions.scorers.refusal import SubstringRefusal

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

FORMS = (
    "lexicon:rude, lexicon:FILE, refusal, refusal-log-odds, agreement, falsehood, hedging,"
    " hf:MODEL[:LABEL[:sigmoid|softmax]] (the completion alone), hf+prompt:… (behind its prompt), regex:PATTERN"
)
"""What can be typed."""
DERIVE = 120
"""Built-in requests of each kind that the tokens of the log-odds are derived from and tested on."""
_Maker = Callable[[str, "HookedTransformer | None"], Scorer]


def scorer_named(text: str, model: "HookedTransformer | None" = None) -> Scorer:
    """The scorer that a text names: see `FORMS`.

    model: the model whose answers are to be scored; only the log-odds need it, whose tokens are derived from its
    answers to the built-in requests that belong to it.

    Raises:
        DataError: no such scorer, or one that lacks its argument; what the scorer itself raises.
    """
    _check_name(text)
    kind, _, rest = text.partition(":")
    return _MAKERS[kind](rest, model)


def prepared_scorers(texts: Sequence[str]) -> "Callable[[HookedTransformer], list[Scorer]]":
    """Make the scorers that need no model at once, so that a wrong name or file is found before one is loaded.

    Returns:
        A function from the model to all scorers, in the order of the texts.

    Raises:
        DataError: no such scorer; what the scorers themselves raise.
    """
    for text in texts:
        _check_name(text)
    ready = {text: scorer_named(text) for text in texts if text.partition(":")[0] not in NEED_MODEL}
    return lambda model: [ready[text] if text in ready else scorer_named(text, model) for text in texts]


def _check_name(text: str) -> None:
    kind, _, rest = text.partition(":")
    if kind not in _MAKERS:
        raise DataError(f"no scorer {text!r}: choose {FORMS}")
    if kind in NEED_MODEL:
        _no_argument(kind, rest)


def _lexicon(rest: str, model: "HookedTransformer | None") -> Scorer:
    return lexicon(rest or "rude")


def _refusal(rest: str, model: "HookedTransformer | None") -> Scorer:
    _no_argument("refusal", rest)
    return SubstringRefusal()


def _agreement(rest: str, model: "HookedTransformer | None") -> Scorer:
    _no_argument("agreement", rest)
    return AgreementReader.of(_all_rows("beliefs"))


def _falsehood(rest: str, model: "HookedTransformer | None") -> Scorer:
    _no_argument("falsehood", rest)
    return FalsehoodReader.of(_all_rows("facts"))


def _hedging(rest: str, model: "HookedTransformer | None") -> Scorer:
    _no_argument("hedging", rest)
    return HedgingReader()


def _all_rows(table: str) -> list[Row]:
    return [row for split in SPLITS for row in ENGLISH.rows(table, split)]


def _log_odds(rest: str, model: "HookedTransformer | None") -> Scorer:
    from safety_lens.interventions.scorers.refusal_tokens import LogOddsRefusal, derive_refusal_tokens

    if model is None:
        raise DataError("the scorer refusal-log-odds needs the model whose answers it scores")
    prompts = [built_in_for(model).requests(label, "train")[:DERIVE] for label in ("harmful", "harmless")]
    return LogOddsRefusal(derive_refusal_tokens(model, *prompts))


def _classifier(rest: str, model: "HookedTransformer | None") -> Scorer:
    return _reading(rest, "completion")


def _classifier_of_both(rest: str, model: "HookedTransformer | None") -> Scorer:
    return _reading(rest, "both")


def _reading(rest: str, text: str) -> Scorer:
    from safety_lens.interventions.scorers.classifier import DEFAULT_MODEL, ClassifierScorer

    if Path(rest).expanduser().is_dir() and rest:
        return ClassifierScorer(Path(rest).expanduser(), text=text)
    name, label, head, *more = [*rest.split(":"), "", ""]
    if any(more):
        raise DataError(f"the scorer hf:{rest} has too many parts: hf:MODEL[:LABEL[:sigmoid|softmax]]")
    return ClassifierScorer(name or DEFAULT_MODEL, label=label or None, head=head or None, text=text)


def _regex(rest: str, model: "HookedTransformer | None") -> Scorer:
    if not rest:
        raise DataError("the scorer regex needs a pattern: regex:PATTERN")
    return PatternScorer(rest)


def _no_argument(name: str, rest: str) -> None:
    if rest:
        raise DataError(f"the scorer {name} takes no argument, got {rest!r}")


_MAKERS: dict[str, _Maker] = {
    "lexicon": _lexicon,
    "refusal": _refusal,
    "refusal-log-odds": _log_odds,
    "agreement": _agreement,
    "falsehood": _falsehood,
    "hedging": _hedging,
    "hf": _classifier,
    "hf+prompt": _classifier_of_both,
    "regex": _regex,
}
NEED_MODEL = {"refusal-log-odds"}
"""Scorers that are made from the model's own answers."""
