"""GPTQ (arXiv 2210.17323): columns are rounded one after another, and what each loses is made up for by those still to come.

The loss is that of the layer's output on calibration text, tr(D H D^T) for a change D of the weights, with H the mean of x x^T.
A block's scale is searched before any rounding, on the original weights, so columns may be taken in the order of falling
H[i, i] (the paper's act-order) while codes stay where they are: no permutation is left for run time.
"""
import numpy as np

from edgeattn.exporters.quantisers.rtn import pad, search

NEEDS_STATISTICS = True
ZERO_POINTS = None
DAMPING = 0.01  # of the mean of H's diagonal, added to it
BATCH = 128     # columns whose corrections to later ones are applied at once, as a matrix product


def quantise(weight, bits, block_size, statistics):
    return quantise_columns(weight, bits, block_size, statistics.hessian, *factorise(statistics.hessian))


def quantise_columns(weight, bits, block_size, hessian, order, factor):
    """`quantise`, given what `factorise` makes of the hessian."""
    k, diagonal, zero = weight.shape[1], np.diag(hessian), 1 << (bits - 1)
    weight = pad(np.where(diagonal > 0, weight, np.float32(0)), block_size)  # nothing comes in where it is zero
    importance = np.ones(weight.shape[1], np.float32)
    importance[:k] = diagonal / max(diagonal.mean(), 1e-30)
    scales = search(weight, bits, block_size, importance)
    signed = _compensate(np.ascontiguousarray(weight[:, order].T), scales.astype(np.float32).T[order // block_size], factor, bits)
    codes = np.full(weight.shape, zero, np.uint8)
    codes[:, order] = signed.T + np.int16(zero)
    return codes, scales, None


def factorise(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of columns, and U upper triangular with U^T U = the inverse of the damped H in that order."""
    diagonal = np.diag(hessian)
    order = np.argsort(-diagonal, kind="stable")
    damped = hessian[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices_from(damped)] += np.where(diagonal[order] > 0, DAMPING * diagonal.mean(), 1)
    return order, inverse_factor(damped).astype(np.float32)


def inverse_factor(matrix: np.ndarray) -> np.ndarray:
    """U upper triangular with U^T U = the inverse of a positive definite matrix [..., n, n]."""
    # With J the reversal, J H J = L L^T gives H^-1 = (J L^-1 J)^T (J L^-1 J), and J L^-1 J is upper triangular.
    lower = np.linalg.cholesky(matrix[..., ::-1, ::-1])
    return np.linalg.solve(lower, np.broadcast_to(np.eye(matrix.shape[-1]), matrix.shape))[..., ::-1, ::-1]


def _compensate(rest, scales, factor, bits):
    """rest [K, n] is used up; scales [K, n] -> signed codes [K, n] int8. Transposed, so that a column's weights are contiguous."""
    k, zero = len(rest), 1 << (bits - 1)
    codes = np.empty(rest.shape, np.int8)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    for start in range(0, k, BATCH):
        stop = min(start + BATCH, k)
        errors = np.empty((stop - start, rest.shape[1]), np.float32)
        for i in range(start, stop):
            code = np.clip(np.rint(rest[i] * inverse[i]), -zero, zero - 1)
            codes[i] = code
            errors[i - start] = (rest[i] - code * scales[i]) / factor[i, i]
            rest[i + 1:stop] -= factor[i, i + 1:stop, None] * errors[i - start]
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return codes
