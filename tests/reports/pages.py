"""Pages as a reader and as a browser see them, and a name that would like to be more than a name."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

EVIL = """<script>alert("1")</script> & 'it' <b onclick=x> "><img src=x onerror=y> {{ 7 * 7 }} $x_{$"""
VOID = {"meta", "img", "br", "link", "hr", "input"}
TAGS = {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "footer", "section", "div", "p",
        "pre", "h1", "h2", "h3", "i", "ol", "ul", "li", "b", "span", "a", "code", "figure", "figcaption", "img",
        "table", "thead", "tbody", "tr", "th", "td"}  # fmt: skip
ATTRIBUTES = {"lang", "charset", "name", "content", "class", "id", "href", "src", "width", "height", "style", "alt"}


class Page(HTMLParser):
    """Collects text, tags, attributes and what lies in them, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def read(path: Path) -> Page:
    """The page in a file, every element closed."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def words_of(path: Path) -> str:
    """What a reader reads, without styles and pictures."""
    text = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", text)))


def is_harmless(path: Path) -> Page:
    """The page, which has no tag, attribute or address but those of the template, whatever names came in."""
    page = read(path)
    assert set(page.tags) <= TAGS and {name for _, name, _ in page.attributes} <= ATTRIBUTES
    addresses = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+|#s\d+", address) for address in addresses)
    raw = path.read_text(encoding="utf-8")
    assert not any(word in raw for word in ("<script", "http:", "https:", "@import", "url(", "<link", "javascript:"))
    return page
