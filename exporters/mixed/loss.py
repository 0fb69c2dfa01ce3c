"""The default: every bit goes where it saves the most divergence from the checkpoint.

A matrix's divergence is measured once, with that matrix alone at 2 bits. Each further bit divides the error of its output by about four,
whichever matrix it is (on models/nano by 4.1 to 4.5), and the divergence with it. Divergences of all matrices are taken to add up, which
makes the prediction that an export reports.
"""
from edgeattn.exporters.mixed import Matrix, best_value

NEEDS = ("divergence",)
LEFT = {2: 1.0, 3: 1 / 4.3, 4: 1 / 17.3, 8: 1 / 4400}  # of the divergence at 2 bits


def loss(matrix: Matrix, bits: int) -> float:
    """Predicted KL in nats a token."""
    return matrix.divergence * LEFT[bits]


def widths(matrices: list[Matrix], bits: float) -> dict[str, int]:
    return best_value(matrices, bits, loss)
