"""A report as its reader's browser takes it apart."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Elements of a page: attributes, ids, text by element, and whether every tag is closed.

    Attributes:
        ids: in order.
        tags: (name, attributes) in order.
        texts: (names of the open elements, their classes, text).
        rows: cells of the rows of all tables, as text.
        unclosed: elements left open or closed in a wrong place.
    """

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str, str]] = []
        self.unclosed: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        self.unclosed += [name for name, _ in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(str(found["id"]))
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        if tag not in _VOID:
            self._open.append((tag, str(found.get("class", ""))))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.unclosed.append(f"/{tag}")
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            names = tuple(name for name, _ in self._open)
            if "td" in names:
                self.rows[-1][-1] += data.strip()
            self.texts.append((names, self._open[-1][1] if self._open else "", data.strip()))

    @property
    def headings(self) -> list[str]:
        """Of sections."""
        return [text for names, _, text in self.texts if names[-1:] == ("h2",)]

    @property
    def figures(self) -> list[str]:
        """Titles of plots and cards."""
        return [text for names, _, text in self.texts if names[-1:] == ("h3",)]

    def of_class(self, name: str) -> list[str]:
        """Texts whose own element has a class."""
        return [text for _, cls, text in self.texts if name in cls.split()]

    @property
    def text(self) -> str:
        """All text, a line an element."""
        return "\n".join(text for names, _, text in self.texts if not {"style", "script"} & set(names))
