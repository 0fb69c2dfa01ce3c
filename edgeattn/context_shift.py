"""Go on when the context is full: the first tokens stay, and the newest half of the others, computed again at fresh positions.

Nothing is moved within the cache, so keys carry the right rotation, and every storage type and eviction policy is served alike.
"""
from dataclasses import dataclass

from edgeattn.page_formats import PAGE


@dataclass(frozen=True)
class ContextShift:
    """keep: how many first tokens stay, half of the context at most. None: a page's worth, which attention leans on; in a conversation
    the system prompt, where there is one."""
    keep: int | None = None

    def __post_init__(self):
        if self.keep is not None and self.keep < 0:
            raise ValueError(f"keep must be 0 or more tokens, got {self.keep}")

    def kept(self, ctx_size: int) -> int:
        return min(PAGE if self.keep is None else self.keep, ctx_size // 2)

    def cut(self, ids: list[int], ctx_size: int, dropped: int = 0) -> tuple[list[int], int]:
        """-> (the ids that stay, how many behind the kept ones do not).

        dropped: how many were dropped already, of these ids or of ones nearly like them: a text that is read again may have other
        tokens. More are dropped where those that are left leave no room for another token.
        """
        keep = self.kept(ctx_size)
        most = max(0, len(ids) - keep - max(1, (ctx_size - keep) // 2))
        dropped = most if len(ids) - min(dropped, most) >= ctx_size else min(dropped, most)
        return ids[:keep] + ids[keep + dropped:], dropped

    def restart(self, model, sequence) -> None:
        """Cut `sequence` so that what comes next is computed as in a fresh one: to the kept tokens where the cache holds all tokens as
        they were computed; else to nothing, because quantised or thinned pages would have come about differently."""
        model.truncate(sequence, min(self.kept(model.ctx_size), sequence.length) if model.cache.exact else 0)
