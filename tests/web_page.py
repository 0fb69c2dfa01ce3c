"""The chat page for tests: a real model whose answers are written beforehand, a real server, a real browser."""
import contextlib
import os
import shutil
import time

import pytest

from edgeattn.apps.server import run
from edgeattn.apps.server.app import make_app
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.settings import Settings
from edgeattn.apps.store import Store
from edgeattn.apps.web.routes import make_router
from edgeattn.cache.options import CacheOptions
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer

from server_model import serving


class Script:
    """What the model says next, instead of what it would: `say(text, seconds between tokens)`."""

    def __init__(self, tokenizer):
        self._tokenizer, self._texts, self._delay = tokenizer, [], 0.0

    def say(self, *texts, delay=0.0):
        self._texts, self._delay = list(texts), delay

    def sampler(self, options):
        """In place of a Sampler, which is made for each answer."""
        if not self._texts:
            from edgeattn.generation import Sampler
            return Sampler(options)
        ids = iter([*self._tokenizer.encode(self._texts.pop(0), special=False), *self._tokenizer.end_tokens])
        delay = self._delay

        def choose(logits, history):
            time.sleep(delay)
            return next(ids)
        return choose


class Page:
    """A server with the page. address; store; script; engine."""

    def __init__(self, folder, path, monkeypatch, settings=Settings()):
        self._folder, self.store = folder, Store(path)
        tokenizer = Tokenizer(folder)
        self.script = Script(tokenizer)
        monkeypatch.setattr(run, "Sampler", self.script.sampler)
        self.engine = Engine(*self._load({}), load=self._load)
        self.app = make_app(self.engine, settings, (make_router(self.engine, self.store, settings),))

    def _load(self, changes):
        cache = CacheOptions(changes.get("cache_type_k") or "auto", changes.get("cache_type_v") or "auto", budget=changes.get("kv_budget"))
        return Model.load(self._folder, cache=cache, threads=1), Tokenizer(self._folder)

    @contextlib.contextmanager
    def open(self):
        self.engine.start()
        try:
            with serving(self.app) as self.address:
                yield self
        finally:
            self.engine.close()


@pytest.fixture(scope="session")
def chromium():
    """A browser. Without one tests are skipped, but not where all of them must run."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and os.environ.get("CI") != "true":
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
