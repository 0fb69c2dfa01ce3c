"""What a plan's steps are on a GPU: kernel launches, made once for each bucket of counts that they serve."""
from dataclasses import dataclass

from edgeattn.batch import COUNTS


@dataclass(frozen=True)
class Bucket:
    """The largest counts that launches serve. sparse: whether pages are selected; listed: whether prompts read what lists say; probes: last
    rows of each sequence whose attention is added up."""
    tokens: int
    rows: int
    sequences: int
    slots: int
    sparse: bool
    listed: bool = False
    probes: int = 0

    @property
    def decodes(self) -> bool:
        """Whether every sequence has one token."""
        return self.tokens == self.sequences

    def most(self) -> dict:
        """As kernels' launches() want it."""
        found = {"tokens": self.tokens, "rows": self.rows, "sequences": self.sequences, "slots": self.slots, "sparse": self.sparse,
                 "listed": self.listed, "probes": self.probes}
        return found | {i: found.get(name, 0) for i, name in enumerate(COUNTS)}


@dataclass(frozen=True)
class Step:
    """One native operator: which node it came from, and the ints that its ARGS mean."""
    name: str
    operator: str
    kernel: object
    arguments: dict
    workspace_bytes: int

    def launches(self, bucket: Bucket) -> list:
        most = bucket.most()
        rows = [self.arguments[name] for name in self.kernel.ARGS if name.endswith(".rows")]
        if not all(most[row] for row in rows) or self.operator == "select_pages" and not bucket.sparse:
            return []
        if getattr(self.kernel, "FOR_PROMPTS", False) and not bucket.listed:
            return []
        return self.kernel.launches(self.arguments, most)


class Table:
    """Consecutive steps, and what was made of them for each bucket."""

    def __init__(self, steps: list[Step]):
        self.steps, self.launches, self.graphs, self.ran = steps, {}, {}, set()

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, part: slice) -> "Table":
        return Table(self.steps[part])
