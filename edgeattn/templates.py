"""Chat templates, in a process of their own: they are programs that come with a model, may never end, and fill memory by one line.

`TemplateProcess` sends template and variables to `python -m edgeattn.templates`, which renders them in Jinja's sandbox. It has 1 GiB of
address space, and once it has started it can open no file and no socket (Linux and macOS; on Windows the sandbox and the watch on
memory and time remain). Both ways a message is its length in 8 bytes and JSON.
"""
import json
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

import psutil

CPU_SECONDS, SECONDS, RSS_BYTES, LONGEST = 5, 60, 512 << 20, 64 << 20  # of one call; LONGEST: bytes of a message
GLANCE = 0.05  # seconds between two looks at the process
WARM_UP = ("{{ strftime_now('%c %Z') }}{{ messages | tojson | pprint | trim | length }}{{ lipsum(1) }}", "{{ raise_exception('') }}",
           "{% for %}", "{{ ''.__class__ }}", "{{ none.a.b }}")  # loads what is loaded when it is needed, errors included


class TemplateProcess:
    """Renders templates one at a time; the process starts at the first and ends with this object."""

    def __init__(self):
        self._process, self._lock, self._stop = None, threading.Lock(), None

    def render(self, template: str, variables: dict) -> str:
        """The text; `variables` is what JSON can hold. ValueError: the template is invalid, failed, or took too much time or memory."""
        try:
            message = json.dumps({"template": template, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the chat template failed: {error}") from None
        if len(message) > LONGEST:
            raise ValueError(f"the conversation has more than {LONGEST >> 20} MiB")
        with self._lock:
            answer = self._ask(message)
        if "text" not in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        if self._stop:
            self._stop()
            self._process = self._stop = None

    def _ask(self, message):
        if self._process is None or self._process.poll() is not None:
            self._start()
        done, why = threading.Event(), []
        threading.Thread(target=_watch, args=(self._process, done, why), daemon=True).start()
        try:
            _send(self._process.stdin, message)
            return _receive(self._process.stdout)
        except (OSError, ValueError):  # it was ended
            self.close()
            return {"error": f"the chat template failed: {why[0] if why else 'its process ended'}"}
        except BaseException:  # Ctrl-C: what it is about to answer belongs to nobody
            self.close()
            raise
        finally:
            done.set()

    def _start(self):
        self.close()
        # -P: what lies in the current folder, perhaps a model's, must not be imported. A session of its own: Ctrl-C is meant for us.
        command = [sys.executable, "-P", "-m", "edgeattn.templates"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         start_new_session=True)
        self._stop = weakref.finalize(self, _end, self._process)


def _end(process):
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()


def _watch(process, done, why):
    """End the process when it takes too much for one call."""
    try:
        about = psutil.Process(process.pid)
        begun, waited = sum(about.cpu_times()[:2]), 0.0
        while not done.wait(GLANCE):
            waited += GLANCE
            if about.memory_info().rss > RSS_BYTES:
                why.append(f"it took more than {RSS_BYTES >> 20} MiB of memory")
            elif sum(about.cpu_times()[:2]) - begun > CPU_SECONDS or waited > SECONDS:
                why.append(f"it took more than {CPU_SECONDS} seconds")
            if why:
                return process.kill()
    except psutil.Error:  # it has ended
        return None


def _send(file, message):
    file.write(len(message).to_bytes(8, "little") + message)
    file.flush()


def _receive(file):
    """EOFError when the other side has gone."""
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > 8 * LONGEST:
        raise ValueError("no message")
    return json.loads(file.read(length))


# ---- in the process ----------------------------------------------------------------------------------------------
def _serve():
    from edgeattn.template_world import Renderer
    renderer, asked, answers = Renderer(), sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write where answers go
    for template in WARM_UP:
        renderer.answer(template, {"messages": [{"a": 1}]})
    _lock_up()
    while True:
        try:
            asked_for = _receive(asked)
        except ValueError:
            return
        try:
            answer = renderer.answer(**asked_for)
        except MemoryError:
            answer = {"error": "the chat template failed: it took too much memory"}
        except Exception as error:  # a module that would have to be loaded now
            answer = {"error": f"the chat template failed: {type(error).__name__}"}
        _send(answers, json.dumps(answer).encode())


def _lock_up():
    with suppress(ImportError):  # Windows has none of this
        import resource
        for kind, most in (("RLIMIT_AS", 1 << 30), ("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_NPROC", 0), ("RLIMIT_NOFILE", 0)):
            with suppress(ValueError, OSError, AttributeError):
                resource.setrlimit(getattr(resource, kind), (most, most))


if __name__ == "__main__":
    _serve()
