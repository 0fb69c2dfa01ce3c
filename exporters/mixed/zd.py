"""ZD, z-score distribution (arXiv 2406.17415): layers with fewer weights far above the mean get more bits. Needs no text."""
from edgeattn.exporters.mixed import Matrix, best_first

NEEDS = ("tail",)


def widths(matrices: list[Matrix], bits: float) -> dict[str, int]:
    return best_first(matrices, bits, lambda m: -m.tail)
