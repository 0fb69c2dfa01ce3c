"""A model for tests of the server that says what follows from all of its tokens, so that no token may be lost, doubled or mixed up;
engines over it, and servers that run in a thread."""
import contextlib
import hashlib
import queue
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn

from edgeattn.apps.server import connection
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.run import Job
from edgeattn.cache.pages import CacheFull
from edgeattn.generation import SamplerOptions
from edgeattn.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parent.parent / "models/nano")
WORDS = np.array([i for i in range(300, 8192) if i not in TOKENIZER.end_tokens])
GREEDY = SamplerOptions(temperature=0)


class FakeSequence:
    def __init__(self, ids=()):
        self.ids = list(ids)

    @property
    def length(self):
        return len(self.ids)


class FakeModel:
    """`pages`: tokens that all sequences together may hold, none of them shared. granule: truncate() leaves a multiple of it, as quantised
    pages do. delay: seconds of a forward call."""
    vocab_size, device = 8192, "cpu"
    scheduler = prefill = None
    dense_because = whole_because = "off"
    config = {"source": {"name": "fake"}, "precision": "int4"}
    cache = SimpleNamespace(options=SimpleNamespace(k_type="f16", v_type="f16"))

    def __init__(self, ctx_size=512, ubatch=64, pages=None, granule=1, delay=0.0):
        self.ctx_size, self.ubatch, self.pages, self.granule, self.delay = ctx_size, ubatch, pages or 100 * ctx_size, granule, delay
        self.open, self.computed, self.batches = [], 0, []

    def new_sequence(self):
        self.open.append(FakeSequence())
        return self.open[-1]

    def fork(self, sequence):
        self.open.append(FakeSequence(sequence.ids))
        return self.open[-1]

    def truncate(self, sequence, length):
        assert 0 <= length <= sequence.length
        if length < sequence.length:
            length -= length % self.granule
        del sequence.ids[length:]
        return length

    def free(self, sequence):
        self.truncate(sequence, 0)

    @property
    def held(self):
        return sum(sequence.length for sequence in self.open)

    def kv_bytes(self):
        return self.held

    def forward(self, work, logit_rows="last"):
        time.sleep(self.delay)
        self.open = [sequence for sequence in self.open if sequence.length or any(sequence is s for s, _ in work)]
        assert len({id(sequence) for sequence, _ in work}) == len(work) and all(len(ids) for _, ids in work)
        if self.held + sum(len(ids) for _, ids in work) > self.pages:
            for sequence, _ in work:
                self.truncate(sequence, sequence.length - sequence.length % self.granule)
            raise CacheFull("full")
        self.batches.append([len(ids) for _, ids in work])
        rows = []
        for sequence, ids in work:
            for place, token in enumerate(ids):
                sequence.ids.append(token)
                self.computed += 1
                if logit_rows == "all" or place == len(ids) - 1:
                    rows.append(next_logits(sequence.ids))
        return np.stack(rows)


def next_logits(ids):
    """[vocab] float32 that depend on every token and its place."""
    seed = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest()[:8]
    random = np.random.default_rng(int.from_bytes(seed, "little"))
    logits = np.full(8192, -20, np.float32)
    logits[random.choice(WORDS, 5, replace=False)] = random.normal(2, 1, 5)
    return logits


def greedy(prompt, count):
    """What FakeModel says after a prompt."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(next_logits(ids).argmax()))
    return ids[len(prompt):]


@pytest.fixture
def started():
    """A function that starts an engine over a FakeModel, which the test's end closes."""
    engines = []

    def start(model=None, **options):
        engines.append(Engine(model or FakeModel(), TOKENIZER, **options).start())
        return engines[-1]
    yield start
    for engine in engines:
        engine.close()


def job(prompt, count=8, **more):
    return Job(list(prompt), **{"sampling": GREEDY, "max_tokens": count} | more)


def ask(engine, jobs):
    """-> (runs, a queue of (index, piece))"""
    news = queue.Queue()
    return engine.submit(jobs, [lambda piece, i=i: news.put((i, piece)) for i in range(len(jobs))]), news


def finish(engine, jobs):
    """-> (runs, the last pieces)"""
    runs, news = ask(engine, jobs)
    ends = {}
    while len(ends) < len(jobs):
        index, piece = news.get(timeout=30)
        if piece.finish_reason or piece.error:
            ends[index] = piece
    return runs, [ends[i] for i in range(len(jobs))]


def answer(run):
    return run.tokens[len(run.job.prompt):]


@contextlib.contextmanager
def serving(app, connections=600):
    """The address of a real server on a free port, with so many connections at most."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = uvicorn.Server(connection.config(app, connections))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
