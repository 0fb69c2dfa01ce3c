import numpy as np

from edgeattn.page_formats import PAGE


def read_pages(k_codes, k_params, v_codes, v_params, *, head_dim, k_type, v_type, k_axis="channel", one_group=0, separated=0, gate=16):
    """The values that quantised pages stand for: minimum + code * step. Arguments are what seal_pages returns.

    ->  k [pages, head_dim, 32], v [pages, 32, head_dim]   float32
    """
    pages, blocks = len(k_codes), -(-head_dim // PAGE)
    if k_type == "delta":
        k = _implied(k_codes, head_dim, gate or head_dim)
    else:
        k = _keys(k_codes, k_params, head_dim, k_type, k_axis, one_group)
    v = np.stack([unpack(codes, PAGE, v_type) for codes in np.split(v_codes, blocks, 1)], 1)  # [pages, block, token, channel]
    v = v.transpose(0, 1, 3, 2).reshape(pages, blocks * PAGE, PAGE).astype(np.float32)
    p = v_params.view(np.float16).astype(np.float32)
    count = 2 * PAGE * (1 if one_group else blocks)
    low, step = _of_channels(p[:, :count], one_group, blocks)
    v = low + v * step
    if separated:
        v = v * p[:, count:, None]
    return k, v.transpose(0, 2, 1)[..., :head_dim]


def _keys(codes, params, head_dim, kind, axis, one_group):
    p = params.view(np.float16).astype(np.float32)
    if axis == "channel":
        low, step = p.reshape(len(p), 2, head_dim, 1).transpose(1, 0, 2, 3)
    else:
        low, step = _of_channels(p, one_group, -(-head_dim // PAGE))[:, :, :head_dim]
    return low + unpack(codes, head_dim, kind).astype(np.float32) * step


def _implied(codes, head_dim, gate):
    """Keys as deltas: each block's newest values that were written at or before the token."""
    head, blocks = -(-(4 + 4 * head_dim // gate) // 64) * 64, head_dim // gate
    written = np.unpackbits(codes[:, 4:4 + 4 * blocks].reshape(len(codes), blocks, 4), axis=2, bitorder="little").astype(bool)
    newest = np.maximum.accumulate(np.where(written, np.arange(PAGE), 0), 2)
    k = np.zeros((len(codes), head_dim, PAGE), np.float16)
    for keys, page, kept in zip(k, codes, np.repeat(written, gate, 1)):
        keys[kept] = page[head:head + 2 * kept.sum()].copy().view(np.float16)
    return np.take_along_axis(k, np.repeat(newest, gate, 1), 2).astype(np.float32)


def _of_channels(params, one_group, blocks):
    """(minimum, step), each [pages, channels, 32], from [pages, groups * 2 * 32]."""
    groups = 1 if one_group else blocks
    return np.repeat(params.reshape(len(params), groups, 2, PAGE), blocks * PAGE // groups, 1).transpose(2, 0, 1, 3)


def unpack(codes, rows, kind):
    """[pages, bytes] uint8 -> [pages, rows, 32] codes."""
    pages = len(codes)
    if kind == "int8":
        high, low = codes.reshape(pages, 2, rows // 4, 64).transpose(1, 0, 2, 3)
        quads = np.stack([high << 4 | low & 15, high & 240 | low >> 4], 2)
    elif kind == "int4":
        x = codes.reshape(pages, rows // 4, 64)
        quads = np.stack([x & 15, x >> 4], 2)
    else:
        low, quads = codes[:, :rows * 8].reshape(pages, rows // 8, 64), np.zeros((pages, rows // 4, 2, 64), np.uint8)
        for q in range(2):
            quads[:, q::2] = np.stack([low >> 4 * q & 3, low >> 4 * q + 2 & 3], 2)
        if kind == "int3":
            top = codes[:, rows * 8:].reshape(pages, rows // 16, 64)
            for q in range(4):
                quads[:, q::4] |= np.stack([top >> 2 * q & 1, top >> 2 * q + 1 & 1], 2) << 2
    return quads.reshape(pages, rows // 4, 2, 16, 4).transpose(0, 1, 4, 2, 3).reshape(pages, rows, 32)
