"""What verbs print with: tables on stdout, progress and remarks on stderr."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from safety_lens.progress import NAME, progressed, restart

if TYPE_CHECKING:
    from safety_lens.data import Concept

PROCESS = int(os.environ.get("RANK", "0"))
"""The number of this process under torchrun or `accelerate launch`; the first, 0, speaks for all."""
out = Console(highlight=False, quiet=PROCESS > 0)
err = Console(stderr=True, highlight=False, quiet=PROCESS > 0)


def quiet_libraries() -> None:
    """Keep loaders' progress bars and advice out of the output, and print progress of our own; errors come through."""
    from transformers.utils import logging as transformers_logging

    # peft reads an old name of a transformers setting in every model it wraps; a user cannot mend that
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # peft looks for the vocabulary's size in a config.json next to the base: a GGUF file has none
    warnings.filterwarnings("ignore", message=r"Could not find a config file in .*\.gguf", category=UserWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    show_log(NAME)
    restart()


def print_pairs(concepts: "Sequence[Concept]") -> None:
    """Print which pairs are in use, a line for each concept, on stderr."""
    from safety_lens.data.built_in import pairs_in_use

    for concept in concepts:
        err.print(f"pairs: {pairs_in_use(concept)}", markup=False, soft_wrap=True)


class _Printed(logging.Handler):
    """Print what the library logs as lines on stderr; warnings are marked with "!"."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "! " if record.levelno >= logging.WARNING else ""
        err.print(f"{mark}{record.getMessage()}", markup=False, soft_wrap=True)


def show_log(name: str) -> None:
    """Print the lines that one of the library's loggers writes, on stderr and also where that is no terminal."""
    log = logging.getLogger(name)
    if not any(isinstance(handler, _Printed) for handler in log.handlers):
        log.addHandler(_Printed())
    log.setLevel(logging.INFO)


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr: a bar that vanishes when done on a terminal, elsewhere a line every half minute.

    Args:
        done: Units of `total` that were done before.

    Yields:
        The function that advances it by a number of units.
    """
    if not err.is_terminal:
        yield _Lines(what, total, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda n: bar.advance(task, n)


class _Lines:
    """Progress in a log file: a line every half minute with the time that is left."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.done, self.before, self.start = what, total, done, done, monotonic()
        progressed(what, done, total)

    def __call__(self, n: int) -> None:
        self.done += n
        rate = (monotonic() - self.start) / max(self.done - self.before, 1)
        left = duration(rate * max(self.total - self.done, 0))
        progressed(self.what, self.done, self.total, f", about {left} left")


def duration(seconds: float) -> str:
    """Length of time in the largest fitting unit: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
