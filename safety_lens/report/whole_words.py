"""Tables whose words stay whole: cells break at spaces, then inside brackets, then behind separators in names.

rich gives every column what is left and breaks words where that is too little: "proximit/y". Here the widths are
chosen from where the cells may break, so that nothing is cut in the middle of a word, and nothing is left out.
"""

import re
from collections.abc import Callable, Iterator, Sequence, Set

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.style import Style
from rich.table import Table
from rich.text import Text

SEPARATOR = re.compile(r"(?<=[A-Za-z]{2}[-_./~])(?=\w)|(?<=\d[._/])(?=[A-Za-z])")
"""Behind a separator in a name ("hook_|resid_|post", "blocks.|7.|hook"), never in a number ("1e-03", "2.54")."""
WITH_BRACKETS, SINGLE = re.compile(r"\[[^\]]*\]\S*|\S+"), re.compile(r"\S+")
"""Words of a line: an interval "[0.95, 1.00]" as one, or as two."""


Wrap = Callable[[str, int], list[str]]


class WordTable:
    """A table that is laid out for the terminal it is printed on. Cells are plain text, or a Text of one style.

    columns: headings. title: above it. lines: a rule between rows. unbroken: headings of columns whose lines stay as
    they are while anything else can give way, such as names to be copied.
    """

    def __init__(
        self, *columns: str, title: str | Text | None = None, lines: bool = False, unbroken: Sequence[str] = ()
    ) -> None:
        self.title, self.lines = title, lines
        self.unbroken = {place for place, column in enumerate(columns) if column in unbroken}
        self.columns = [Text(column) for column in columns]
        self.rows: list[tuple[list[Text], str | None]] = []
        self.sections: set[int] = set()

    def add_row(self, *cells: str | Text, style: str | None = None) -> None:
        """A row, one cell a column."""
        texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        self.rows.append((texts + [Text("")] * (len(self.columns) - len(texts)), style))

    def add_section(self) -> None:
        """A rule behind the last row."""
        self.sections.add(len(self.rows) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        plain = [[cell.plain for cell in row] for row in (self.columns, *(row for row, _ in self.rows))]
        room = options.max_width - 2 * len(self.columns)  # two spaces between columns, one on either side
        head, *body = fitted(plain, room, self.unbroken)
        table = Table(
            title=self.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_lines=self.lines
        )
        for text in head:
            table.add_column(Text(text), no_wrap=True, overflow="fold")
        for place, ((cells, style), texts) in enumerate(zip(self.rows, body, strict=True)):
            shown = (Text(text, style=cell.style) for text, cell in zip(texts, cells, strict=True))
            table.add_row(*shown, style=Style.parse(style) if style else None, end_section=place in self.sections)
        yield table


def fitted(rows: Sequence[Sequence[str]], width: int, unbroken: Set[int] = frozenset()) -> list[list[str]]:
    """The cells with line breaks, so that the columns together are no wider than `width` characters.

    The widest columns give way first, and what is left over goes to the first that can use it. Intervals stay on one
    line where that is possible, and words are broken in the middle only where not even that is enough. unbroken:
    columns that are broken only then.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    widest = max(1, *(_widest(cell) for column in columns for cell in column))
    for wrap in (_whole, _words, _folded):
        for cap in range(widest, 0, -1):
            caps = [widest if place in unbroken and wrap is not _folded else cap for place in range(len(columns))]
            cells = [_within(column, most, wrap) for column, most in zip(columns, caps, strict=True)]
            if (spare := width - sum(map(_width, cells))) >= 0:
                return [list(row) for row in zip(*_widened(columns, cells, spare, wrap), strict=True)]
    return [list(row) for row in zip(*cells, strict=True)]


def _widened(columns: Sequence[list[str]], cells: list[list[str]], spare: int, wrap: Wrap) -> list[list[str]]:
    """The columns again, each as wide as it can use of what is left, from the first on."""
    out = []
    for column, narrow in zip(columns, cells, strict=True):
        wider = (_within(column, _width(narrow) + more, wrap) for more in range(spare, -1, -1))
        out.append(next(wider))
        spare -= _width(out[-1]) - _width(narrow)
    return out


def _within(column: Sequence[str], width: int, wrap: Wrap) -> list[str]:
    return ["\n".join(wrap(cell, width)) for cell in column]


def _width(column: Sequence[str]) -> int:
    return max(map(_widest, column))


def _widest(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


def _whole(cell: str, width: int) -> list[str]:
    return [part for line in cell.split("\n") for part in _wrapped(line, width, WITH_BRACKETS)]


def _words(cell: str, width: int) -> list[str]:
    return [part for line in cell.split("\n") for part in _wrapped(line, width, SINGLE)]


def _folded(cell: str, width: int) -> list[str]:
    """The last resort."""
    return [part[i : i + width] for part in _words(cell, width) for i in range(0, max(1, len(part)), width)]


def _wrapped(line: str, width: int, words: re.Pattern[str]) -> list[str]:
    """A line in parts of at most `width`, or as wide as its longest piece; an indent is kept in every part."""
    if cell_len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    parts = [""]
    for word in words.findall(line):
        pieces = [word] if cell_len(indent + word) <= width else SEPARATOR.split(word)
        for place, piece in enumerate(pieces):
            joined = f"{parts[-1]}{' ' if parts[-1] and not place else ''}{piece}"
            if parts[-1] and cell_len(indent + joined) > width:
                parts.append(piece)
            else:
                parts[-1] = joined
    return [indent + part for part in parts]
