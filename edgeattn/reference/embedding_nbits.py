from edgeattn.reference.matmul_nbits import unpack_panels


def embedding_nbits(ids, codes, scales, zero_points=None, *, bits, block_size, K, N):
    """Rows of a block-quantised table (panels as in matmul_nbits, so that a tied head shares the initializer).

    ids  [tokens]      int64, 0 <= id < N
    ->   [tokens, K]   float32
    """
    return unpack_panels(codes, scales, zero_points, bits=bits, block_size=block_size, K=K, N=N)[ids]
