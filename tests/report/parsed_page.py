"""The report as a reader of HTML finds it."""

import re
from html.parser import HTMLParser

from reasonembed.report import write_report


class Page(HTMLParser):
    """Text and tags of a page; fails where an element is not closed, or closed twice."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self, markup):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(markup)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name, f"{name} closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page_of(builder):
    """The report of a run, after the checks that hold for every page."""
    page = checked(write_report(builder.run).read_text(encoding="utf-8"))
    assert not {"script", "form"} & set(page.tags)
    assert not re.search(r"\b(nan|inf)\b", page.text, re.IGNORECASE)
    return page


def checked(markup):
    """A page that needs nothing beside it and on which no text has become markup."""
    page = Page(markup)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "action") and not name.startswith("on")
        assert name != "href" or value.startswith("#")
    style = markup.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert page.tags.count("svg") == len(
        [value for name, value in page.attributes if name == "viewbox"]
    )
    return page
