"""One self-contained HTML page: text in, escaped markup out.

`Html` is markup that is safe to place in a page; everything that takes plain text escapes it. Prompts, generated texts
and names are untrusted, so the page also forbids, by its own policy, scripts and anything from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NewType

Html = NewType("Html", str)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; padding: 1.2rem 1.5rem 4rem; max-width: 1120px; background: #fff; color: #1c1c1c;
  overflow-wrap: anywhere; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; margin: .2rem 0 .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem;
  border-top: 1px solid #ddd; padding-top: 1rem } h3 { font-size: 1rem; margin: 1.3rem 0 .3rem }
nav { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .1rem 1rem } a { color: #00548a }
p { margin: .4rem 0; max-width: 75ch } .note { color: #555; font-size: .88rem } .provenance { overflow-wrap: anywhere }
.missing { background: #f6f6f6; border-left: 3px solid #999; padding: .4rem .8rem }
.warning { background: #fff6e5; border-left: 3px solid #e69f00; padding: .4rem .8rem }
.scroll { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .84rem; overflow-wrap: normal }
th, td { padding: .18rem .7rem .18rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee }
th { border-bottom-color: #999; font-weight: 600 } .number { text-align: right; font-variant-numeric: tabular-nums }
td.number { white-space: nowrap }
svg.figure { display: block; width: 100%; min-width: 620px; height: auto; margin: .6rem 0 }
svg.figure * { stroke-linejoin: round; stroke-linecap: butt }
details { margin: .4rem 0 } summary { cursor: pointer; color: #00548a; font-size: .88rem; overflow-wrap: anywhere }
pre { background: #f7f7f7; padding: .6rem .8rem; font-size: .8rem; overflow-x: auto; margin: .3rem 0 }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  max-height: 22rem; overflow-y: auto }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: .8rem }
.card { min-width: 0 } .card h4 { font-size: .85rem; margin: .3rem 0 0; overflow-wrap: anywhere }
.tag { display: inline-block; border: 1px solid #999; border-radius: 3px; padding: 0 .35rem; margin-right: .3rem;
  font-size: .74rem; color: #444; background: #fff }
.tag.refusal { border-color: #d55e00; color: #9a4400 } .tag.degenerate { border-color: #a87400; color: #7a5400 }
.tag.other { border-color: #0072b2; color: #00548a } .tag.length { border-style: dashed }
@media print { details.sql { display: none } }
"""

_INVALID = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Section:
    """A headed part of a page. Sections with the same anchor would share a link: give each its own."""

    anchor: str
    title: str
    body: Sequence[Html]


def text(value: object) -> Html:
    """Escape plain text; characters that HTML does not allow become U+FFFD."""
    return Html(html.escape(_INVALID.sub("\ufffd", str(value).replace("\r\n", "\n")), quote=True))


def element(tag: str, *content: Html, css: str = "") -> Html:
    """Wrap markup in an element."""
    attribute = f' class="{text(css)}"' if css else ""
    lead = "\n" if tag == "pre" else ""  # HTML drops one newline there: let it be this one
    return Html(f"<{tag}{attribute}>{lead}{''.join(content)}</{tag}>")


def paragraph(value: str, css: str = "") -> Html:
    return element("p", text(value), css=css)


def note(value: str) -> Html:
    """A remark in small type, on how to read what is above it."""
    return paragraph(value, "note")


def missing(why: str) -> Html:
    """The line that stands where a section has nothing to show."""
    return paragraph(why, "missing")


def heading(value: str) -> Html:
    return element("h3", text(value))


def figure(svg: str) -> Html:
    """Take an SVG element from `analysis.plots`, which escapes its own text."""
    if not svg.startswith("<svg") or "<script" in svg:
        raise ValueError("this is not a figure of analysis.plots")
    return element("div", Html(svg), css="scroll")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Lay out rows of text and numbers; None is shown as a dash.

    A head that starts with ``#`` (not shown) has a column of numbers below it, aligned to the right.
    """
    css = ["number" if head.startswith("#") else "" for head in heads]
    top = [element("th", text(head.removeprefix("#")), css=name) for head, name in zip(heads, css, strict=True)]
    lines = [element("tr", *top)]
    for row in rows:
        cells = ["\u2013" if cell is None else str(cell) for cell in row]
        lines.append(element("tr", *(element("td", text(c), css=name) for c, name in zip(cells, css, strict=True))))
    return element("div", element("table", *lines), css="scroll")


def fold(summary: str, *content: Html, css: str = "", opened: bool = False) -> Html:
    """Put content behind a line that opens it."""
    attributes = (f' class="{text(css)}"' if css else "") + (" open" if opened else "")
    return Html(f"<details{attributes}>{element('summary', text(summary))}{''.join(content)}</details>")


def sql(*queries: str) -> Html:
    """Show the queries behind what stands above, each to be run again with ``resid sql``."""
    return fold("SQL", *(element("pre", element("code", text(f"{query};"))) for query in queries), css="sql")


def tag(value: str) -> Html:
    """A small label; its first word chooses the colour."""
    return element("span", text(value), css=f"tag {re.sub(r'[^a-z]', '', (value.split() or [''])[0].lower())}")


def render(title: str, top: Sequence[Html], sections: Sequence[Section]) -> str:
    """Assemble the page: a head of its own, links to the sections, and the sections."""
    links = [Html(f'<a href="#{text(part.anchor)}">{text(part.title)}</a>') for part in sections]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>",
        element("h1", text(title)),
        *top,
        element("nav", *links),
    ]
    for part in sections:
        parts.append(f'<section id="{text(part.anchor)}">{element("h2", text(part.title))}')
        parts += [*part.body, "</section>"]
    return "\n".join([*parts, "</body></html>", ""])
