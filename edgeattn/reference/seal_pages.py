import numpy as np

from edgeattn.page_formats import BITS, PAGE


def seal_pages(k, v, *, k_type, v_type, k_axis="channel", one_group=0, separated=0, threshold=0.0, gate=16, refresh=0.0):
    """Quantise whole pages; layouts and meaning of the types: page_formats.py. |x - restored| <= step / 2.

    k  [pages, head_dim, 32]   float32, keys after rotary (and rotation)
    v  [pages, 32, head_dim]   float32
    ->  k_codes [pages, bytes] uint8, k_params [pages, n] uint16 (bits of halves), v_codes, v_params
    Minima are rounded down to halves and steps up, so that minimum + (2**bits - 1) * step bounds what was stored.
    """
    pages, head_dim = k.shape[:2]
    width = -(-head_dim // PAGE) * PAGE
    padded = np.zeros((pages, PAGE, width), np.float32)
    padded[..., :head_dim] = v
    scales = np.zeros((pages, 0), np.uint16)
    if separated:
        largest = np.sqrt(np.abs(padded).max(1)).astype(np.float16)
        largest[largest == 0] = 1
        scales, padded = largest.view(np.uint16), padded / largest.astype(np.float32)[:, None]
    v_codes, v_params = _by_token(padded.transpose(0, 2, 1), v_type, one_group)
    v_rows = v_codes.reshape(pages, -1, PAGE, PAGE).transpose(0, 1, 3, 2)  # block of channels, token, channel
    v_packed = np.concatenate([pack(rows, v_type) for rows in v_rows.transpose(1, 0, 2, 3)], 1)
    if k_type == "delta":
        return _deltas(k, threshold, gate, refresh), np.zeros((pages, 0), np.uint16), v_packed, \
            np.concatenate([v_params.reshape(pages, -1).view(np.uint16), scales], 1)
    if k_axis == "channel":
        low, step = _parameters(k.min(2), k.max(2), k_type)
        k_codes, k_params = _codes(k, low[..., None], step[..., None], k_type), np.stack([low, step], 1)
    else:
        k_codes, k_params = _by_token(k, k_type, one_group)
    return pack(k_codes, k_type), k_params.reshape(pages, -1).view(np.uint16), v_packed, \
        np.concatenate([v_params.reshape(pages, -1).view(np.uint16), scales], 1)


def _by_token(x, kind, one_group):
    """[pages, channels, 32] -> codes and halves [pages, groups, 2, 32]; a group is 32 channels, or all of them and then symmetric."""
    size, params, codes = x.shape[1] if one_group else PAGE, [], np.zeros(x.shape, np.uint8)
    for first in range(0, x.shape[1], size):
        part = x[:, first:first + size]
        low, step = _symmetric(np.abs(part).max(1), kind) if one_group else _parameters(part.min(1), part.max(1), kind)
        codes[:, first:first + size] = _codes(part, low[:, None], step[:, None], kind)
        params.append(np.stack([low, step], 1))
    return codes, np.stack(params, 1)


def _deltas(k, threshold, gate, refresh):
    """Keys of which only blocks that moved more than Theta since they were last written are kept (page_formats.py)."""
    (pages, depth, _), gate = k.shape, gate or k.shape[1]
    k = k.astype(np.float16).astype(np.float32)
    total = np.cumsum((k * k).reshape(pages, -1, 16), 1)[:, -1]  # in the kernel's order, as a sum decides what is kept
    while total.shape[1] > 1:
        total = total[:, :total.shape[1] // 2] + total[:, total.shape[1] // 2:]
    theta = (np.float32(threshold) * np.sqrt(total[:, 0] / np.float32(PAGE * depth))).astype(np.float16).astype(np.float32)
    written, last = np.ones((pages, depth // gate, PAGE), bool), k[..., 0]
    for t in range(1, PAGE):
        written[..., t] = np.abs(k[..., t] - last).reshape(pages, -1, gate).max(2) > theta[:, None]
        last = np.where(np.repeat(written[..., t], gate, 1), k[..., t], last)
    skipped = (~written).sum((1, 2)).astype(np.float32) / np.float32((PAGE - 1) * depth // gate)
    theta[skipped < np.float32(refresh)], written[skipped < np.float32(refresh)] = 0, True
    head = -(-(4 + 4 * depth // gate) // 64) * 64
    codes = np.zeros((pages, head + 2 * PAGE * depth), np.uint8)
    codes[:, :4] = theta.view(np.uint8).reshape(pages, 4)
    codes[:, 4:4 + 4 * depth // gate] = np.packbits(written, 2, bitorder="little").reshape(pages, -1)
    for page, keys, kept in zip(codes, k.astype(np.float16), np.repeat(written, gate, 1)):
        values = keys[kept].view(np.uint8)  # channel by channel
        page[head:head + len(values)] = values
    return codes


def _parameters(low, high, kind):
    low16 = low.astype(np.float16)
    low16 = np.where(low16.astype(np.float32) > low, np.nextafter(low16, np.float16(-np.inf)), low16)
    return low16, _up((high - low16.astype(np.float32)) / np.float32(2 ** BITS[kind] - 1))


def _symmetric(largest, kind):
    step = _up(largest / np.float32(2 ** (BITS[kind] - 1) - 1))
    return -step * np.float16(2 ** (BITS[kind] - 1)), step


def _up(step):
    step16 = step.astype(np.float16)
    return np.where(step16.astype(np.float32) < step, np.nextafter(step16, np.float16(np.inf)), step16)


def _codes(x, low, step, kind):
    low, step = low.astype(np.float32), step.astype(np.float32)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    return np.clip(np.rint((x - low) * inverse), 0, 2 ** BITS[kind] - 1).astype(np.uint8)


def pack(codes, kind):
    """[pages, rows, 32] -> [pages, bytes] uint8."""
    pages, rows, _ = codes.shape
    quads = codes.reshape(pages, rows // 4, 4, 2, 16).transpose(0, 1, 3, 4, 2).reshape(pages, rows // 4, 2, 64)
    a, b = quads[:, :, 0], quads[:, :, 1]
    if kind == "int8":
        return np.concatenate([(x[0] | x[1] << 4).reshape(pages, -1) for x in ((a >> 4, b >> 4), (a & 15, b & 15))], 1)
    if kind == "int4":
        return (a | b << 4).reshape(pages, -1)
    low = (a & 3) | (b & 3) << 2
    low = (low[:, ::2] | low[:, 1::2] << 4).reshape(pages, -1)
    if kind == "int2":
        return low
    top = np.zeros((pages, rows // 16, 64), np.uint8)
    for q in range(4):
        top |= (a[:, q::4] >> 2 | b[:, q::4] >> 2 << 1) << 2 * q
    return np.concatenate([low, top.reshape(pages, -1)], 1)
