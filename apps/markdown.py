"""Markdown of answers: finished blocks while it streams, and HTML in which a model's text can do nothing."""
import html
import re
from functools import cache

COLOURED = 20_000  # characters of code that get colours: some lexers take time by the square of it
ALLOWED = re.compile(r"(https?://|mailto:)", re.IGNORECASE)  # what a link may lead to


@cache
def _parser():
    """CommonMark with tables. HTML is text; images are links, because nothing may be fetched while an answer is read."""
    from markdown_it import MarkdownIt
    made = MarkdownIt("commonmark", {"html": False, "highlight": _highlight}).enable(["table", "strikethrough"])
    made.disable(["image", "html_block", "html_inline", "reference"])
    made.validateLink = lambda url: bool(ALLOWED.match(url))
    made.add_render_rule("link_open", _link)
    return made


class Blocks:
    """Text that grows, cut at its top-level blocks (paragraphs, lists, code): `tail` is what a later token may still change."""

    def __init__(self):
        self.tail = ""

    def add(self, text: str) -> list[str]:
        """The blocks that this completes."""
        self.tail += text
        if "\n" not in text:
            return []
        starts = sorted({token.map[0] for token in _parser().parse(self.tail) if token.level == 0 and token.map})
        if len(starts) < 2:
            return []
        lines = self.tail.split("\n")
        self.tail = "\n".join(lines[starts[-1]:])
        return ["\n".join(lines[start:end]).strip("\n") for start, end in zip(starts, starts[1:])]


def to_html(text: str) -> str:
    """Markdown as HTML of our own tags only: whatever looks like HTML in it shows as text."""
    return _parser().render(text)


def _highlight(code, language, attributes):
    """A code block's inside; "" leaves the escaping to the renderer."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound
    if len(code) > COLOURED:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return ""
    return highlight(code, lexer, HtmlFormatter(nowrap=True))


def _link(self, tokens, at, options, env):
    address = html.escape(str(tokens[at].attrGet("href")))
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer">'
