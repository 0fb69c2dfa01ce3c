"""Places in one block of memory for values that do not all live at the same time."""


def place(lives: list[tuple[str, int, int, int]]) -> tuple[dict[str, int], int]:
    """lives: (name, bytes, when it is made, when it is read last), in the order in which they are made -> (offset of each, bytes of all)"""
    live, offsets, total = [], {}, 0
    for name, size, first, last in lives:
        live = [entry for entry in live if entry[2] >= first]
        offsets[name] = _first_fit(live, size)
        live.append((offsets[name], offsets[name] + size, last))
        total = max(total, offsets[name] + size)
    return offsets, total


def _first_fit(live, size):
    """The lowest offset at which `size` bytes overlap nothing in `live` [(start, end, ...)]."""
    start = 0
    for low, high, _ in sorted(live):
        if start + size <= low:
            break
        start = max(start, high)
    return start


def covered(spans: list[tuple[int, int]]) -> int:
    """How much lies in one of the spans (start, end) at least."""
    found, reached = 0, 0
    for start, end in sorted(spans):
        found += max(0, end - max(start, reached))
        reached = max(reached, end)
    return found
