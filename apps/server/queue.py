"""Who is next: clients take turns, so that one with many requests does not keep the others waiting."""
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator


class FairQueue:
    """Runs that wait, in turn by client; those that were interrupted come before all others."""

    def __init__(self):
        self._interrupted, self._clients = deque(), OrderedDict()

    def __len__(self) -> int:
        return len(self._interrupted) + sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator:
        yield from self._interrupted
        for waiting in self._clients.values():
            yield from waiting

    def put(self, run) -> None:
        self._clients.setdefault(run.job.client, deque()).append(run)

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
        waiting = self._clients[run.job.client]
        waiting.remove(run)
        self._clients.move_to_end(run.job.client)  # the others are next
        if not waiting:
            del self._clients[run.job.client]
