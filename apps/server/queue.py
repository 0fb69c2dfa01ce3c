"""Who is next: clients take turns, so that one with many requests does not keep the others waiting."""
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import chain


class Busy(RuntimeError):
    """There is no room or time for this now; the client is to come again."""


class FairQueue:
    """Runs that wait; those that were interrupted come before all others. Addresses take turns, and at each address the names that its
    requests give (`session`, `user`): anybody can invent names, and must not gain by it, while users behind one address, such as a
    proxy's, are told apart by nothing else."""

    def __init__(self):
        self._interrupted, self._clients = deque(), OrderedDict()  # {address: {name: runs}}, who is next first

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator:
        yield from self._interrupted
        for names in self._clients.values():
            yield from chain.from_iterable(names.values())

    def put(self, run) -> None:
        address, name = run.job.client
        self._clients.setdefault(address, OrderedDict()).setdefault(name, deque()).append(run)

    def put_back(self, run) -> None:
        """One that had begun."""
        self._interrupted.appendleft(run)

    def next(self, ready: Callable) -> object | None:
        """The first one in turn for which ready(run), which stays in the queue; None: there is none."""
        return next((run for run in self if ready(run)), None)

    def remove(self, run) -> None:
        if run in self._interrupted:
            self._interrupted.remove(run)
            return
        address, name = run.job.client
        names = self._clients[address]
        names[name].remove(run)
        _last(names, name)  # the others are next
        _last(self._clients, address)


def _last(turns, key):
    turns.move_to_end(key)
    if not turns[key]:
        del turns[key]
