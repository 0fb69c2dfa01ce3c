"""What a chat template can see and do: Jinja's sandbox, as transformers sets it up."""
import json
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_TEXT = 16 << 20  # characters of a conversation
MESSAGE = 300            # of an error, which is often the template's own


class Renderer:
    """Renders templates; the last one stays compiled."""

    def __init__(self):
        self._environment, self._source, self._template = _environment(), None, None

    def answer(self, template: str, variables: dict) -> dict:
        """{"text": ...}, or {"error": one line}."""
        try:
            return {"text": self.render(template, variables)}
        except _Invalid as error:
            return {"error": f"the chat template is not valid Jinja: {_short(error)}"}
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            return {"error": f"the chat template failed: {_short(error)}"}

    def render(self, template: str, variables: dict) -> str:
        if template != self._source:
            try:
                self._template, self._source = self._environment.from_string(template), template
            except (TemplateError, RecursionError, ValueError, SyntaxError, AttributeError, TypeError) as error:
                raise _Invalid(error) from None
        pieces, length = [], 0
        for piece in self._template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_TEXT:
                raise ValueError(f"its text is longer than {LONGEST_TEXT >> 20} million characters")
        return "".join(pieces)


class _Invalid(Exception):
    pass


def _short(error):
    return " ".join(str(error).split())[:MESSAGE] or type(error).__name__


class _Generation(Extension):
    """{% generation %} marks what a trainer learns from; here its body is just text."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes < > & for web pages, which the models never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form):
    return datetime.now().strftime(form)


def _raise_exception(message):
    raise TemplateError(message)
