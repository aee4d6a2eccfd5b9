"""A hook of mkdocs: turns the formulas of every page into MathML when the site is built.

Browsers draw MathML themselves, so the pages need no script and no request to another server.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# A prime in the place of an exponent is drawn too small where the font has no variant for it.
_PRIME = re.compile(r"<msup><mi>(\w+)</mi><mi>&#x02032;</mi></msup>")

# `log x` needs a thin space, but `log(x)` does not.
_FUNCTION = re.compile(r"(?<!<msub>)(?<!<msup>)<mi>(log|exp)</mi>(?!<mo)")


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with each formula that `pymdownx.arithmatex` marked as MathML."""
    return _FORMULA.sub(_mathml, html)


def _mathml(formula: re.Match[str]) -> str:
    tag, latex = formula.group(1), unescape(formula.group(2)).strip()
    # latex2mathml stretches `\lVert` and does not know `aligned`.
    latex = re.sub(r"\\[lr]Vert\b", r"\\Vert", latex).replace("{aligned}", "{align*}")
    math = convert(latex, display="block" if tag == "div" else "inline")
    math = _PRIME.sub(r'<mrow><mi>\1</mi><mo lspace="0" rspace="0">&#x02032;</mo></mrow>', math)
    math = _FUNCTION.sub(r'<mi>\1</mi><mspace width="0.17em"/>', math)
    return f'<{tag} class="arithmatex">{math}</{tag}>'
