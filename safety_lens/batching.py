"""Which prompts share a forward pass: groups with a common prefix, and length-sorted batches with little padding."""

from collections.abc import Sequence
from typing import NamedTuple

from safety_lens.errors import DataError

GROUP_OVERHEAD = 64  # tokens of work that one more small forward costs; splitting must save more than that
MAX_DEPTH = (
    16  # prefixes inside prefixes: system prompt, template, few-shot examples; deeper chains are not worth a search
)


class PrefixGroup(NamedTuple):
    """Rows whose first `prefix` tokens are equal and are run once."""

    prefix: int
    rows: list[int]


def _common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    n = 0
    while n < limit and a[n] == b[n]:
        n += 1
    return n


def prefix_groups(ids: Sequence[Sequence[int]], limits: Sequence[int]) -> list[PrefixGroup]:
    """Split rows into groups whose shared prefix is run once, where that saves tokens.

    ids: token ids of each row. limits: for each row, how many leading tokens may be skipped (every token before the
    first one that is read, and never the whole row).
    """
    order = sorted(range(len(ids)), key=lambda i: tuple(ids[i]))
    return _split(ids, limits, order)[1] if order else []


def _split(
    ids: Sequence[Sequence[int]], limits: Sequence[int], rows: list[int], depth: int = 0
) -> tuple[int, list[PrefixGroup]]:
    """(tokens to run, groups) of lexicographically sorted rows: one group, or one per next token, whichever is less."""
    allowed = min(limits[i] for i in rows)
    shared = _common(ids[rows[0]], ids[rows[-1]], allowed)
    prefix = shared if len(rows) > 1 else 0
    cost = GROUP_OVERHEAD * (1 + (prefix > 0)) + prefix + sum(len(ids[i]) - prefix for i in rows)
    done = [
        i for i in rows if limits[i] == shared
    ]  # these can skip no more; one short prompt must not hold up the rest
    if len(rows) < 2 or len(done) == len(rows) or depth == MAX_DEPTH:
        return cost, [PrefixGroup(prefix, rows)]
    parts: list[list[int]] = []
    for i in rows:  # sorted, so equal next tokens are neighbours
        if limits[i] == shared:
            continue
        if parts and ids[i][shared] == ids[parts[-1][0]][shared]:
            parts[-1].append(i)
        else:
            parts.append([i])
    parts += [done] if done else []
    if len(parts) * GROUP_OVERHEAD >= cost:
        return cost, [PrefixGroup(prefix, rows)]
    split = [_split(ids, limits, part, depth + 1) for part in parts]
    if sum(c for c, _ in split) < cost:
        return sum(c for c, _ in split), [group for _, groups in split for group in groups]
    return cost, [PrefixGroup(prefix, rows)]


def check_batch_size(batch_size: int | str) -> None:
    """Refuse what is neither "auto" nor a number of rows.

    Raises:
        DataError: it is neither.
    """
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise DataError(f"batch_size must be 'auto' or a positive number, got {batch_size!r}")


def length_batches(
    lengths: Sequence[int], budget: int, *, max_rows: int | None = None, overhead: int = GROUP_OVERHEAD
) -> list[list[int]]:
    """Rows sorted by length and cut where padded tokens plus `overhead` per batch are fewest.

    A batch holds at most `budget` padded tokens (a single longer row is a batch of its own) and `max_rows` rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    n = len(order)
    best, cut = [0] + [0] * n, [0] * (n + 1)
    for end in range(1, n + 1):
        longest = lengths[order[end - 1]]
        rows = max(1, budget // max(longest, 1))
        if max_rows is not None:
            rows = min(rows, max_rows)
        choices = [
            (best[start] + overhead + (end - start) * longest, start) for start in range(max(0, end - rows), end)
        ]
        best[end], cut[end] = min(choices)
    batches, end = [], n
    while end:
        batches.append(order[cut[end] : end])
        end = cut[end]
    return batches[::-1]
