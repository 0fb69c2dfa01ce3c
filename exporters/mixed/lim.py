"""LIM, layer input modification (arXiv 2406.17415): layers that change their input more get more bits; by the cosine of both."""
from edgeattn.exporters.mixed import Matrix, best_first

NEEDS = ("similarity",)


def widths(matrices: list[Matrix], bits: float) -> dict[str, int]:
    return best_first(matrices, bits, lambda m: -m.similarity)
