def add(x, y):
    """x, y, -> [tokens, width] float32"""
    return x + y
