import numpy as np


def linear(x, weight, bias=None):
    """
    x       [tokens, K]   float32
    weight  [N, K]        float32 or float16
    bias    [N]           float32, optional
    ->      [tokens, N]   float32
    """
    out = x.astype(np.float64) @ weight.astype(np.float64).T
    return (out if bias is None else out + bias).astype(np.float32)
