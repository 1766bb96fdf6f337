"""Parse a page: its elements, text and data, with Python's HTML parser."""

from __future__ import annotations

import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements as (tag, attributes), the text of each section, and the content of scripts."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.sections: dict[str, str] = {}
        self._inside, self._section = "", ""
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else self._inside
        if tag == "script":
            self.scripts.append("")
        if tag in ("section", "header"):
            self._section = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = ""
        if tag in ("section", "header"):
            self._section = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data
            self.sections[self._section] = self.sections.get(self._section, "") + data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def tags(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]
