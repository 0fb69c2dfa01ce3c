import numpy as np


def rms_normalization(x, weight, *, epsilon):
    """Root-mean-square normalisation over the last axis (arXiv 1910.07467; ONNX RMSNormalization-23).

    x       [..., width]   float32
    weight  [width]        float32
    ->      [..., width]   float32
    """
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    return (x / np.sqrt(mean_square + epsilon) * weight).astype(np.float32)
