"""Errors a user can cause, and one base to catch them by.

SafetyLensError
├── DataError(ValueError)         a bad pair, an empty split, too few samples for the statistic asked
├── ModelError(ValueError)        a model, adapter or tokenizer that cannot be represented, or cannot do this
├── HookNameError(KeyError)       names the nearest existing hook and the model's layer count
├── ArtifactError(ValueError)     missing file, wrong kind, unknown schema, damaged content
│   └── ModelMismatchError        a direction from another model or of another width
├── WeightSyncError(RuntimeError) fold or load parity above tolerance; prints gap and tolerance
└── OtherProcessError(RuntimeError) another process of a distributed run failed, and says why

A message says what was asked, what was found and what to do. The command line prints it, without a traceback,
and exits 2.
"""


class SafetyLensError(Exception):
    """Base of every error that a user of Safety Lens can cause."""


class DataError(SafetyLensError, ValueError):
    """Contrast pairs, prompts or splits that cannot answer the question asked."""


class ModelError(SafetyLensError, ValueError):
    """A model, adapter or tokenizer that cannot be loaded faithfully or cannot do what was asked."""


class HookNameError(SafetyLensError, KeyError):
    """A hook name that the model does not have."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the message in quotes


class ArtifactError(SafetyLensError, ValueError):
    """A saved artifact that is missing, damaged, or of another kind or schema."""


class ModelMismatchError(ArtifactError):
    """An artifact that was made with another model."""


class WeightSyncError(SafetyLensError, RuntimeError):
    """The hooked model does not reproduce the model it was made from."""


class OtherProcessError(SafetyLensError, RuntimeError):
    """Another process of a distributed run failed; that one says why, so this one need not."""
