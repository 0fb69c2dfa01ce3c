"""Where a chat's conversation is kept: the store that the web page shows too. What fails is told once, and the chat goes on."""
import sys

from edgeattn.apps.store import Changed, Store


class Kept:
    """A conversation of a chat in the store.

    number  its number there; None: not kept yet
    on      whether it is to be kept at all
    """

    def __init__(self, on: bool, model: str):
        self.on, self.number, self._revision, self._model, self._store = on, None, None, model, None
        self._saved = self._told = None

    @property
    def store(self) -> Store:
        """Opened when it is first needed; ValueError, OSError: it cannot be."""
        if self._store is None:
            self._store = Store()
        return self._store

    def save(self, messages: list[dict], title: str | None = None) -> None:
        """Make what is kept these messages; what could not be saved before is saved too."""
        if not self.on or self.number is None and not any(m["role"] == "user" for m in messages) or messages == self._saved and not title:
            return
        from edgeattn.apps.cli import one_line
        try:
            self.number, self._revision = self.store.save(messages, self._model, self.number, self._revision, title)
            self._saved, self._told = [dict(message) for message in messages], None
        except Changed as error:  # both go on
            self.start()
            self.save(messages, title)
            print(f"{error}; this one is kept as conversation {self.number}", file=sys.stderr)
        except (ValueError, OSError) as error:
            self.on = self.on and isinstance(error, OSError)  # a damaged file does not mend itself
            if self._told != (why := one_line(error)):
                print(f"not kept: {why}", file=sys.stderr)
            self._told = why

    def start(self) -> None:
        """What is saved next is a new conversation."""
        self.number = self._revision = self._saved = None

    def load(self, name: str) -> list[dict]:
        """The messages of the conversation that goes by a number or title, which is saved into from now on. ValueError, OSError."""
        found = self.store.load(self.store.find(name))
        self.number, self._revision = found["id"], found["revision"]
        self._saved = [{"role": m["role"], "content": m["content"]} for m in found["messages"]]
        return [dict(message) for message in self._saved]
