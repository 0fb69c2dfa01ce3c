"""Flags that take several values, so that one call compares settings: `-ctk f16,int4 --sparse-attention off,auto` are four of them."""
import argparse
import copy
import itertools
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from edgeattn.apps import options

MODEL = "-m"  # what is measured is no part of how it is run


class Axis(list):
    """The values of one flag; `texts` is how they were typed."""

    def __init__(self, values, texts: list[str]):
        super().__init__(values)
        self.texts = texts


@dataclass(frozen=True)
class Flag:
    """How a flag is written, and its default."""
    name: str
    default: object


class Flags:
    """A parser, or a group of one, whose flags with values accept several with commas between them."""

    def __init__(self, group, found: dict[str, Flag]):
        self._group, self._found = group, found

    def add_argument_group(self, title: str) -> "Flags":
        return Flags(self._group.add_argument_group(title), self._found)

    def add_argument(self, *names: str, **about) -> None:
        if about.get("action", "store") == "store":
            choices = about.pop("choices", None)
            about["type"] = _values(about.get("type", str), choices, MODEL in names)
            if choices:
                about.setdefault("metavar", f"{{{','.join(map(str, choices))}}}")
        action = self._group.add_argument(*names, **about)
        self._found[action.dest] = Flag(names[0], action.default)


def _values(one: Callable, choices, path: bool):
    def parse(text):
        texts = [text] if path and os.path.exists(text) else text.split(",")
        if len(set(texts)) < len(texts):
            raise argparse.ArgumentTypeError(f"names a value twice: {text!r}")
        try:
            values = [one(part) for part in texts]
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"invalid {getattr(one, '__name__', 'choice')} value: {text!r}") from None
        for value, part in zip(values, texts):
            if choices and value not in choices:
                raise argparse.ArgumentTypeError(f"invalid choice: {part!r} (choose from {', '.join(map(str, choices))})")
        return Axis(values, texts)
    return parse


def add_model(parser: argparse.ArgumentParser) -> None:
    """options.add_model, every flag of which may be an axis: what is parsed then goes through `expand`."""
    found: dict[str, Flag] = {}
    options.add_model(Flags(parser, found))
    parser.set_defaults(axes=found)


def defaults() -> dict[str, str]:
    """{flag: its default as it would be typed}, of the flags that have one."""
    parser = argparse.ArgumentParser()
    add_model(parser)
    found = parser.get_default("axes").values()
    return {flag.name: str(flag.default) for flag in found if flag.default is not None and not isinstance(flag.default, bool)}


def expand(args: argparse.Namespace) -> list[tuple[str, argparse.Namespace]]:
    """The Cartesian product of a command's axes: (label, args) for each setting, args as a command without axes has them. The label names
    the flags that differ between the settings; "" where there is only one."""
    axes = {dest: values for dest in args.axes if isinstance(values := getattr(args, dest), Axis)}
    found = []
    for choice in itertools.product(*(range(len(values)) for values in axes.values())):
        one, label = copy.copy(args), []
        one.given = {}
        for (dest, values), i in zip(axes.items(), choice):
            setattr(one, dest, values[i])
            flag = args.axes[dest]
            if values[i] != flag.default:
                one.given[flag.name] = values.texts[i]
            if len(values) > 1:
                label += [flag.name, values.texts[i]]
        found.append((shlex.join(label), one))
    return found


def check(args: argparse.Namespace) -> None:
    """ValueError where the flags of one setting contradict each other, before anything is loaded."""
    for make in (options.cache_options, options.sparse_options, options.prefill_options):
        make(args)


def setting(args: argparse.Namespace) -> str:
    """The flags of one setting that are not defaults, as text; its model left out."""
    return shlex.join(part for name, text in args.given.items() if name != MODEL for part in (name, text))


def arguments(args: argparse.Namespace) -> list[str]:
    """What a command needs to be told to run one setting, model included."""
    return [part for name, text in args.given.items() for part in (name, text)]
