"""Tokens of before/after texts on one offline page, drawn by circuitsvis: projection, and what was touched."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from safety_lens.errors import DataError
from safety_lens.report.offline import bundle, document, inert, json_text, visible

__all__ = ["TokenView", "token_page", "visible"]


@dataclass(frozen=True)
class TokenView:
    """One text.

    title, lines: plain text above it. tokens: in order. values: one row per token of the numbers named by `labels`;
    NaN is drawn as 0 and said so. touched: whether a token was changed.
    """

    title: str
    lines: Sequence[str]
    tokens: Sequence[str]
    values: Sequence[Sequence[float]]
    labels: Sequence[str]
    touched: Sequence[bool]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
p { margin: .2rem 0; } .note { color: #555; }
.strip { margin: .5rem 0; line-height: 2; } .strip span { padding: .1rem .15rem; border-radius: 3px;
  white-space: pre-wrap; background: #f0f0f0; margin-right: 1px; }
.strip span.hit { background: #d55e00; color: #fff; font-weight: 600; text-decoration: underline; }
.chart { margin: .3rem 0 .8rem; }
""".strip()


def token_page(title: str, views: Sequence[TokenView], *, notes: Sequence[str] = ()) -> str:
    """One HTML document with a section per text.

    Raises:
        DataError: a text whose tokens, values and marks differ in number.
    """
    sections = "\n".join(_section(i, view) for i, view in enumerate(views))
    notes_html = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    charts = "".join(_chart(i, view) for i, view in enumerate(views))
    body = f"<h1>{html.escape(title)}</h1>{notes_html}\n{sections}"
    return document(title, body, style=STYLE, scripts=[bundle(), charts])


def _section(number: int, view: TokenView) -> str:
    if not len(view.tokens) == len(view.values) == len(view.touched):
        raise DataError(
            f"a text with {len(view.tokens)} tokens needs as many rows of values and marks, got {len(view.values)} and"
            f" {len(view.touched)}"
        )
    shown = [visible(token) for token in view.tokens]
    strip = "".join(
        f'<span class="{"hit" if hit else "free"}">{html.escape(token)}</span>'
        for token, hit in zip(shown, view.touched, strict=True)
    )
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in view.lines)
    return (
        f"<section><h2>{html.escape(view.title)}</h2>{lines}"
        f'<p class="note">touched ({sum(view.touched)} of {len(shown)} tokens):</p><div class="strip">{strip}</div>'
        f'<p class="note">choose what colours the tokens; point at a token for its numbers:</p>'
        f'<div class="chart" id="tokens-{number}"></div></section>'
    )


def _chart(number: int, view: TokenView) -> str:
    values = [[0.0 if x != x else round(float(x), 3) for x in row] for row in view.values]
    props = {"tokens": [inert(token) for token in view.tokens], "values": values, "labels": list(view.labels)}
    return f'CircuitsVis.render("tokens-{number}", CircuitsVis.ColoredTokensMulti, {json_text(props)});\n'
