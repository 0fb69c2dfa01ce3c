"""Quality of a model with a setting of its cache and attention: tasks, one file each, over seeded questions or a user's text.

`edgeattn eval` is their command (docs/evaluation.md). A task is a frozen dataclass whose fields are its options and whose `measure` gives
an Outcome; `run` makes a record of it, which `edgeattn report` reads too.
"""
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Protocol

from edgeattn.evaluation.outcome import Outcome

TASKS = ("perplexity", "kld", "needle", "recall", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words",
         "frequent_words", "docqa", "masks")


@dataclass(frozen=True)
class Source:
    """What a task's samples are made of.

    text     a file of text, UTF-8; None: what the task brings itself
    length   tokens of a sample: of a window of text, or of a prompt with its question
    samples  how many questions, rounded up to whole haystacks; of texts: windows, as many as the text has at most
    """
    text: str | None = None
    length: int = 4000
    samples: int = 40
    seed: int = 0


class Task(Protocol):
    """samples, length: where a user names none. room: tokens that the cache needs besides a sample's."""
    samples: ClassVar[int]
    length: ClassVar[int]
    room: ClassVar[int]

    def total(self, source: Source) -> int:
        """What `advance` will count up to, or a little more where a text is short. ValueError: the source does not do."""

    def measure(self, model, tokenizer, source: Source, advance: Callable[[int], None]) -> Outcome:
        """ValueError: the source does not do for this model, in words for its user."""


def load_task(name: str, **options) -> Task:
    """The task of a file of this folder; its class has the file's name. ValueError: there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; tasks are {', '.join(TASKS)}")
    return getattr(import_module(f"edgeattn.evaluation.{name}"), "".join(part.capitalize() for part in name.split("_")))(**options)


def run(model, tokenizer, name: str, source: Source, advance: Callable[[int], None] = lambda n: None, **options) -> dict:
    """A task's part of a record (docs/evaluation.md); Outcome.of gives its values back. options: the task's own."""
    outcome = load_task(name, **options).measure(model, tokenizer, source, advance)
    return {"kind": "eval", "task": name, "depth": source.length, **outcome.record()}
