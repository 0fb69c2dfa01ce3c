"""Questions about documents of the user's own, scored as SQuAD does (Rajpurkar et al., 2016, arXiv 1606.05250): F1 of the words that an
answer shares with the best of the given ones, and how many are the same word for word."""
import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgeattn.evaluation import Source
from edgeattn.evaluation.asking import answer, frame
from edgeattn.evaluation.outcome import Outcome

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Docqa:
    """documents: a file with {"context": ..., "question": ..., "answers": [...]} a line; questions about one context share its reading,
    wherever they stand. limit: tokens of an answer."""
    documents: str | None = None
    limit: int = 32

    samples: ClassVar[int] = 100
    length: ClassVar[int] = 4000

    @property
    def room(self) -> int:
        return self.limit

    def total(self, source: Source) -> int:
        return len(self._rows(source))

    def _rows(self, source):
        if not self.documents:
            raise ValueError('docqa asks about documents of yours: give a file with {"context": ..., "question": ..., "answers": [...]} a '
                             "line, --documents FILE")
        return read(self.documents)[:source.samples]

    def measure(self, model, tokenizer, source: Source, advance) -> Outcome:
        (before, after, _), found, exact = frame(tokenizer), Outcome("quality", []), []
        about = {}  # text -> its questions, which depend on each other
        for row in self._rows(source):
            about.setdefault(row["context"], []).append(row)
        for context, rows in about.items():
            trunk, ids = model.new_sequence(), tokenizer.encode(before + context, special=False)
            asks = [tokenizer.encode(f"\n\n{row['question']}{after}", special=False) for row in rows]
            if (tokens := len(ids) + max(map(len, asks))) > source.length:
                raise ValueError(f"{self.documents}, line {rows[0]['line']}: {tokens} tokens; raise --lengths, which is {source.length}, "
                                 "or give shorter documents")
            try:
                model.forward([(trunk, ids)], "none")
                kv_bytes, scores = model.kv_bytes(), []
                for row, ask in zip(rows, asks):
                    branch = model.fork(trunk)
                    try:
                        said = answer(model, tokenizer, branch, ask, self.limit)
                    finally:
                        model.free(branch)
                    scores.append(max(f1(said, wanted) for wanted in row["answers"]))
                    exact.append(max(normal(said) == normal(wanted) for wanted in row["answers"]))
                    advance(1)
            finally:
                model.free(trunk)
            found.add(scores, kv_bytes, tokens)
        found.metrics = {"F1": float(np.mean(sum(found.values, []))), "exact match": float(np.mean(exact))}
        return found


def read(path: str) -> list[dict]:
    """The questions of a file. ValueError names the line that is none."""
    found = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")  # splitlines would cut a text with U+2028
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
            if not answers or not all(isinstance(x, str) for x in (row["context"], row["question"], *answers)):
                raise ValueError("texts are wanted")
        except (ValueError, LookupError, TypeError):
            raise ValueError(f'{path}, line {number}: must be {{"context": text, "question": text, "answers": [text, ...]}}') from None
        found.append({"context": row["context"], "question": row["question"], "answers": answers, "line": number})
    if not found:
        raise ValueError(f"{path}: holds no question")
    return found


def normal(text: str) -> list[str]:
    """Words in small letters, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words; 1 where neither has any."""
    a, b = Counter(normal(said)), Counter(normal(wanted))
    same = (a & b).total()
    if not a or not b:
        return float(a == b)
    return 2 * same / (a.total() + b.total())
