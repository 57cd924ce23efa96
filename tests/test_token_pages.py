"""The page of tokens: offline, escaped, and drawn from the installed circuitsvis."""

import re
from html.parser import HTMLParser

import pytest

from safety_lens.errors import DataError
from safety_lens.report.tokens import TokenView, token_page, visible

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028\"'"


def view(tokens: list[str], touched: list[bool] | None = None, **more: object) -> TokenView:
    hits = touched or [False] * len(tokens)
    settings = {"title": "t", "lines": ["l"], "values": [[0.5, float("nan")]] * len(tokens), "labels": ["a", "b"]}
    return TokenView(tokens=tokens, touched=hits, **{**settings, **more})  # type: ignore[arg-type]


class Elements(HTMLParser):
    """Counts start tags outside the bundle, and keeps the texts of spans."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def parsed(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(page)
    return parser.tags


def test_text_of_any_kind_makes_no_element_and_ends_no_script() -> None:
    tags = parsed(token_page(EVIL, [view([EVIL, "b"], title=EVIL, lines=[EVIL], labels=[EVIL, "x"])], notes=[EVIL]))
    assert [name for name, _ in tags].count("script") == 2  # the bundle and the charts
    assert not [name for name, _ in tags if name == "img"]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    tags = parsed(token_page("t", [view(["a"]), view(["b"])]))
    assert not [attrs for _, attrs in tags if "src" in attrs or "href" in attrs]
    assert [name for name, _ in tags].count("script") == 2  # the bundle once, then all charts


def test_touched_tokens_are_marked_and_counted() -> None:
    page = token_page("t", [view(["a", "b", "c"], [False, True, False])])
    assert re.findall(r'<span class="(\w+)">(\w)</span>', page) == [("free", "a"), ("hit", "b"), ("free", "c")]
    assert "touched (1 of 3 tokens)" in page


def test_white_space_is_made_visible() -> None:
    assert [visible(t) for t in ("a\nb", "\t", "", " x")] == ["a↵b", "⇥", "∅", " x"]


def test_numbers_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="2 tokens needs as many"):
        token_page("t", [TokenView("t", [], ["a", "b"], [[1.0]], ["x"], [True, False])])


def test_the_page_stays_below_one_and_a_half_megabytes() -> None:
    assert len(token_page("t", [view(["word"] * 500)]).encode()) < 1.5e6
