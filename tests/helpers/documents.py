"""Parse a report's files independently of their writers, into tables of cells and all other text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import NamedTuple

Cells = list[list[str]]


class Document(NamedTuple):
    """``tables`` hold headings, then rows, without emphasis marks; ``prose`` is all other text."""

    tables: list[Cells]
    prose: list[str]


def from_markdown(text: str) -> Document:
    tables: list[Cells] = []
    prose: list[str] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("| "):
            inside = False
            prose.append(_plain(re.sub(r"!?\[(.*?)\]\((plots/\d+_\w+\.png)\)", r"\1", line)))
            continue
        cells = [_plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not inside:
            tables.append([])
        inside = True
        if not all(re.fullmatch(":?-+:?", cell) for cell in cells):
            tables[-1].append(cells)
    return Document(tables, prose)


def _plain(text: str) -> str:
    text = re.sub(r"(?<!\\)\*\*|</?sup>", "", text)
    return re.sub(r"\\(.)", r"\1", text)


def from_latex(text: str) -> Document:
    tables: list[Cells] = []
    prose: list[str] = []
    for line in text.splitlines():
        if line.strip() == r"\toprule":
            tables.append([])
        elif line.endswith(r" \\"):
            tables[-1].append([_from_tex(cell.strip()) for cell in re.split(r"(?<!\\)&", line[:-3])])
        else:
            prose.append(_from_tex(line))
    return Document(tables, prose)


def _from_tex(text: str) -> str:
    text = re.sub(r"\\textsuperscript\{([a-z,]*)\}", r" \1", text)
    text = re.sub(r"\\textbf\{((?:[^{}\\]|\\.)*)\}", r"\1", text)
    for written, meant in (
        (r"$\pm$", "±"),
        ("$-$", "−"),
        (r"$\times$", "×"),
        (r"\textasciicircum{}", "^"),
        ("--", "–"),
        (r"\textasciitilde{}", "~"),
    ):
        text = text.replace(written, meant)
    return re.sub(r"\\([&%$#_{}])", r"\1", text)


class _Page(HTMLParser):
    """Collects text by element, visible text of attributes, and the lengths of bars."""

    BLOCKS = ("title", "h1", "h2", "p", "li", "caption", "dt", "dd", "figcaption", "summary", "code", "a")

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Cells] = []
        self.prose: list[str] = []
        self.shares: list[float] = []
        self.outside: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.outside += [found[name] for name in ("src", "href", "srcset", "data", "action") if name in found]
        self.prose += [found[name] for name in ("alt", "title", "aria-label", "data-label") if name in found]
        if share := re.search(r"--share: ([\d.]+)", found.get("style", "")):
            self.shares.append(float(share[1]))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in self.BLOCKS:
            self.prose.append("")
        if tag not in ("meta", "link", "img", "source"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data
        else:
            self.prose[-1:] = [(self.prose or [""])[-1] + data]


def from_html(text: str) -> tuple[Document, _Page]:
    page = _Page()
    page.feed(text)
    assert page._open == []
    tables = [[[" ".join(cell.split()) for cell in row] for row in table] for table in page.tables]
    return Document(tables, page.prose), page
