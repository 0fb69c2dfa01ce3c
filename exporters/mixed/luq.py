"""LUQ (arXiv 2509.23729): layers whose output has the least entropy bear the narrowest width, 2 bits; the others keep 4."""
from edgeattn.exporters.mixed import Matrix, best_first

NEEDS = ("entropy",)
KEPT = 4  # bits


def widths(matrices: list[Matrix], bits: float) -> dict[str, int]:
    return best_first(matrices, bits, lambda m: m.entropy, (2, KEPT) if bits < KEPT else None)
