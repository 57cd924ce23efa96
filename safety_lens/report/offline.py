"""Parts of pages that work from a file, without any request: text made safe, circuitsvis' script, one document.

circuitsvis' own `str()` loads its script from a CDN and its notebook display probes the network first; so the script is
taken from the installed package and inlined once (about 1.3 MB). The document forbids every request, and every script
but its own, by a content security policy.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from safety_lens.errors import DataError

_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
# line breaks that HTML hides, control characters, and marks that turn the direction of writing (they could make a text
# look like another); joiners of emoji and scripts stay
_HIDDEN = re.compile("[\u0000-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]")
_WORD_JOINER = "\u2060"


def visible(token: str) -> str:
    """The token with line breaks, tabs and characters that leave no mark shown as signs; an empty one as ∅."""
    return _HIDDEN.sub(lambda found: _SIGNS.get(found[0], f"⟨{ord(found[0]):04x}⟩"), token) or "∅"


def inert(token: str) -> str:
    """A token that circuitsvis shows as text.

    Its components put tokens into the page as HTML (`dangerouslySetInnerHTML`) and into the bubble as text, so neither
    raw nor escaped text looks right in both. A word joiner (no width) behind "<" and "&" does: HTML begins a tag or a
    character reference only where a letter, "/", "!", "?" or "#" follows.
    """
    return visible(token).replace("<", "<" + _WORD_JOINER).replace("&", "&" + _WORD_JOINER)


def json_text(value: object) -> str:
    """JSON that is safe inside a script element: ASCII, without "<", ">" and "&".

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@lru_cache(maxsize=1)
def bundle() -> str:
    """circuitsvis' script, fit to stand in a script element; it defines `CircuitsVis`.

    Raises:
        DataError: the installed circuitsvis does not bring it.
    """
    import circuitsvis

    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    if not path.is_file():
        raise DataError(f"the installed circuitsvis has no script at {path}: install circuitsvis 1.43 or later")
    # a closing tag inside a string would end the element early; the last line asks debuggers to fetch a source map
    text = path.read_text(encoding="utf-8").replace("</script", "<\\/script")
    return re.sub(r"//# sourceMappingURL=\S*\s*$", "", text)


def document(title: str, body: str, *, style: str, scripts: Sequence[str], data: object = None) -> str:
    """One HTML document that asks for nothing.

    body: HTML, its texts already escaped. scripts: JavaScript that runs after it, in order, the only one that can run:
    the policy lists their hashes, so neither a script element nor an `onerror=` that got into the page does anything.
    data: what scripts read from the element with id "data".
    """
    allowed = " ".join(f"'sha256-{base64.b64encode(_digest(text)).decode()}'" for text in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    held = "" if data is None else f'<script type="application/json" id="data">{json_text(data)}</script>\n'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body>\n{body}\n{held}"
        + "".join(f"<script>{text}</script>\n" for text in scripts)
        + "</body></html>\n"
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write_document(path: Path, page: str) -> int:
    """Write a page; its size in bytes.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    return len(page.encode())
