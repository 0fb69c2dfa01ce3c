"""A change of settings on its way from a request's thread to the engine's, which may be busy, or gone."""
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from edgeattn.apps.server.queue import Busy

BEGIN = 60.0   # seconds until the engine's thread must have time for it; a forward call takes a few at most
LOAD = 900.0   # that loading may take: kernels may have to be compiled
GLANCE = 0.5   # between looks at the engine's thread


class Reload:
    """One change; `over`: it is done, failed, or given up before it began."""

    def __init__(self, changes: dict):
        self.changes, self._done = changes, Future()
        self._began, self._ended = threading.Event(), threading.Event()
        self._done.add_done_callback(lambda done: self._ended.set())

    @property
    def over(self) -> bool:
        return self._done.done()

    def run(self, load: Callable[[dict], dict]) -> None:
        """In the engine's thread, unless it was given up: load(changes) -> what `wait` returns."""
        if self._done.set_running_or_notify_cancel():
            self._began.set()
            try:
                self._done.set_result(load(self.changes))
            except BaseException as error:
                self._done.set_exception(error)

    def wait(self, engine: threading.Thread) -> dict:
        """What load returned or raised. Busy: it did not begin in time, and nothing is changed; it is not over in time; the thread has
        ended."""
        if not _comes(self._began, BEGIN, engine) and self._done.cancel():
            raise Busy(f"the model was busy for {BEGIN:.0f} seconds, so nothing was changed: try again")
        if not _comes(self._ended, LOAD, engine):
            raise Busy(f"the model is still being loaded after {LOAD:.0f} seconds; the settings may change yet")
        return self._done.result()


def _comes(event, seconds, engine):
    """Whether it happens in time."""
    end = time.monotonic() + seconds
    while not event.wait(min(GLANCE, seconds)):
        if not engine.is_alive() and not event.is_set():
            raise Busy("the model's thread has ended: start the server again")
        if time.monotonic() > end:
            return False
    return True
