"""Progress of long loops as lines of a log: at most one every half minute, whatever is running.

Whoever wants the lines listens to the logger `safety_lens.progress`; the command line prints them on stderr.
"""

import logging
from time import monotonic

NAME = "safety_lens.progress"
LOG = logging.getLogger(NAME)
EVERY = 30.0
"""Seconds between two lines."""


class _Clock:
    """Time of the last line, of all loops together: a loop inside another one does not add lines of its own."""

    last = monotonic()


def restart() -> None:
    """Count the seconds to the next line from now: a new piece of work begins."""
    _Clock.last = monotonic()


def progressed(what: str, done: int, total: int, more: str = "") -> None:
    """Log that `done` of `total` units of a loop are done, if no line came in the last `EVERY` seconds."""
    if done < total and monotonic() - _Clock.last >= EVERY:
        restart()
        LOG.info(f"{what}: {done:,} of {total:,}{more}")
