import numpy as np


def embedding(ids, weight):
    """
    ids     [tokens]            int64
    weight  [vocab, width]      float32 or float16
    ->      [tokens, width]     float32
    """
    return weight[ids].astype(np.float32)
