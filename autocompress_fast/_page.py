"""A page of one file that needs nothing else: no script, no style sheet, no picture from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from autocompress_fast._plots import COLOURS, as_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from autocompress_fast.report import Table

__all__ = ["Code", "Picture", "Section", "Tile", "page"]

_STYLE = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 58rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); font-size: 1.2rem }
p { margin: .5rem 0; max-width: 46rem; white-space: pre-line; overflow-wrap: anywhere }
header p, footer, figcaption, caption { color: var(--muted) }
nav { margin: 1.2rem 0 0; font-size: .92rem; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem }
a { color: var(--kept); text-decoration: none }
a:hover { text-decoration: underline }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1.3rem 0 0;
  padding: 0 }
.tiles div { background: var(--band); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem }
.tiles dt { color: var(--muted); font-size: .85rem }
.tiles dd { margin: 0 }
.tiles .value { font-size: 1.55rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums }
.tiles .more { color: var(--muted); font-size: .85rem; font-variant-numeric: tabular-nums }
figure { margin: .8rem 0 1.2rem }
figcaption { font-size: .9rem; max-width: 46rem }
.wide { overflow-x: auto }
svg { display: block; width: 100%; min-width: 33rem; height: auto; stroke-linejoin: round }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-size: .92rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .3rem }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
thead th { color: var(--muted); font-weight: 500 }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 6rem }
.n { text-align: right; white-space: nowrap; padding: .28rem 0 .28rem 1.1rem }
pre { background: var(--band); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-x: auto;
  font-size: .88rem }
footer { margin-top: 3rem; font-size: .85rem }
@media print { body { max-width: none } nav { display: none } figure, tr { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure with words below it; `name` is its own in the page."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines that can be copied."""

    text: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: paragraphs, tables, pictures, code."""

    title: str
    parts: Sequence[str | Table | Picture | Code] = field(default_factory=list)


def page(title: str, lead: Iterable[str], tiles: Iterable[Tile], sections: Iterable[Section], footer: str) -> str:
    """The whole page; sections without parts are left out."""
    shown = [section for section in sections if section.parts]
    links = "\n".join(f'<a href="#{_anchor(section)}">{escape(section.title)}</a>' for section in shown)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_colours()}{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{"".join(f"<p>{escape(text)}</p>" for text in lead)}
<dl class="tiles">
{"".join(map(_tile, tiles))}</dl>
<nav aria-label="Sections">
{links}
</nav>
</header>
<main>
{"".join(map(_section, shown))}</main>
<footer>{escape(footer)}</footer>
</body>
</html>
"""


def _colours() -> str:
    light, dark = ("; ".join(f"--{name}: {pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    return (
        f"\n:root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ {light} }} }}"
    )


def _tile(tile: Tile) -> str:
    more = f'<dd class="more">{escape(tile.more)}</dd>' if tile.more else ""
    return f'<div><dt>{escape(tile.name)}</dt><dd class="value">{escape(tile.value)}</dd>{more}</div>\n'


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _section(section: Section) -> str:
    parts = "\n".join(map(_part, section.parts))
    return f'<section id="{_anchor(section)}">\n<h2>{escape(section.title)}</h2>\n{parts}\n</section>\n'


def _part(part: str | Table | Picture | Code) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, Code):
        return f"<pre><code>{escape(part.text)}</code></pre>"
    if isinstance(part, Picture):
        svg = as_svg(part.figure, part.name, part.caption)
        return f'<figure><div class="wide">{svg}</div>\n<figcaption>{escape(part.caption)}</figcaption></figure>'
    return _table(part)


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    rows = [f"<thead><tr>{_cells(table.header, table.names, 'col')}</tr></thead>", "<tbody>"]
    rows += [f"<tr>{_cells(row, table.names, 'row')}</tr>" for row in table.rows]
    return "\n".join(['<div class="wide"><table>' + caption, *rows, "</tbody></table></div>"])


def _cells(row: Sequence[str], names: int, scope: str) -> str:
    """The first cell of a row, and all of the header, are headings."""
    found = []
    for place, text in enumerate(row):
        kind = "" if place < names else ' class="n"'
        tag = f'th scope="{scope}"' if scope == "col" or place == 0 else "td"
        shown = text if place < names else text.replace(" -> ", " → ")
        found.append(f"<{tag}{kind}>{escape(shown)}</{tag[:2]}>")
    return "".join(found)
