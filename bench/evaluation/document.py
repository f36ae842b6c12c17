"""A report of sections, as one self-contained HTML page and as Markdown beside its pictures."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pearl.bench.report import write_whole

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #cbd5e0; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: 0.2rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #edf2f7; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 1px solid #718096; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; } figcaption { font-size: 13px; color: #4a5568; }
code { background: #edf2f7; padding: 0.1rem 0.3rem; border-radius: 3px; font-size: 13px; }
"""


@dataclass(frozen=True)
class Picture:
    """``draw`` returns a figure."""

    name: str
    caption: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Texts may have `code`."""

    title: str
    content: Sequence[str | Picture | Table]


def write_documents(title: str, sections: Sequence[Section], folder: Path) -> list[Path]:
    """report.html with its pictures in it, report.md with PNGs beside. Returns both."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    page, text = [f"<h1>{html.escape(title)}</h1>"], [f"# {title}"]
    for section in sections:
        page.append(f"<h2>{html.escape(section.title)}</h2>")
        text.append(f"## {section.title}")
        for part in section.content:
            as_html, as_text = _part(part, pictures)
            page.append(as_html)
            text.append(as_text)
    whole = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
    )
    write_whole(folder / "report.html", whole + "\n".join(page) + "\n</body></html>\n")
    write_whole(folder / "report.md", "\n\n".join(text) + "\n")
    return [folder / "report.html", folder / "report.md"]


def _part(part: str | Picture | Table, pictures: Path) -> tuple[str, str]:
    if isinstance(part, str):
        return f"<p>{_inline(part)}</p>", part
    if isinstance(part, Table):
        return _html_table(part), _markdown_table(part)
    figure = part.draw()
    try:
        figure.savefig(pictures / f"{part.name}.png", dpi=130)
        sink = io.StringIO()
        figure.savefig(sink, format="svg")
    finally:
        from matplotlib import pyplot

        pyplot.close(figure)
    _, _, drawing = sink.getvalue().partition("<svg")  # without the XML declaration
    # Ids of several drawings on one page would be each other's.
    drawing = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{part.name}-", drawing)
    caption = f"<figcaption>{_inline(part.caption)}</figcaption>"
    return f"<figure><svg{drawing}{caption}</figure>", f"![{part.caption}](pictures/{part.name}.png)\n\n{part.caption}"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=False))


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_inline(name)}</th>" for name in table.header)
    body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    caption = f"<p>{_inline(table.caption)}</p>" if table.caption else ""
    return f"{caption}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _markdown_table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table.caption}\n\n{body}" if table.caption else body
