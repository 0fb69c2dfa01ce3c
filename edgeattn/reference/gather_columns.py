def gather_columns(x, order):
    """
    x      [tokens, width]   float32
    order  [columns]         int64, each from 0 to width - 1
    ->     [tokens, columns] float32
    """
    return x[:, order]
