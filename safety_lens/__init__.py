"""Safety Lens: concept directions in language models, found, tested, changed and watched through TransformerLens hooks.

The public names below are imported when first used, so that `import safety_lens` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety_lens.activations import Captured as Captured
    from safety_lens.activations import capture as capture
    from safety_lens.artifacts import load_artifact as load_artifact
    from safety_lens.artifacts import save_artifact as save_artifact
    from safety_lens.data import Concept as Concept
    from safety_lens.data import ContrastPair as ContrastPair
    from safety_lens.data import load_concept as load_concept
    from safety_lens.folding import LoraFolder as LoraFolder
    from safety_lens.generation import Generation as Generation
    from safety_lens.generation import generate as generate
    from safety_lens.log import Measurement as Measurement
    from safety_lens.models import hooks_at as hooks_at
    from safety_lens.models import load_hf as load_hf
    from safety_lens.models import load_model as load_model

_HOMES = {
    "activations": ("Captured", "capture"),
    "artifacts": ("load_artifact", "save_artifact"),
    "data": ("Concept", "ContrastPair", "load_concept"),
    "folding": ("LoraFolder",),
    "generation": ("Generation", "generate"),
    "log": ("Measurement",),
    "models": ("hooks_at", "load_hf", "load_model"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'safety_lens' has no attribute {name!r}")
    return getattr(import_module(f"safety_lens.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
