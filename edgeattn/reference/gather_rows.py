def gather_rows(x, indices):
    """
    x        [tokens, width]  float32
    indices  [rows]           int64
    ->       [rows, width]    float32
    """
    return x[indices]
