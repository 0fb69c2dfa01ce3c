import numpy as np


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": _gelu_tanh,
    "relu2": lambda x: np.square(np.maximum(x, 0)),
}


def gated_activation(x, *, activation):
    """activation(gate) * up, where each row of x is gate then up (SwiGLU, arXiv 2002.05202).

    x   [tokens, 2 * width]   float32
    ->  [tokens, width]       float32
    activation: "silu", "gelu_tanh" or "relu2"
    """
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    with np.errstate(over="ignore"):  # exp(-x) of a very negative gate: the quotient is right, zero
        return (ACTIVATIONS[activation](gate) * up).astype(np.float32)
