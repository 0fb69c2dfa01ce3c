import numpy as np


def rotate(x, cos, sin, interleaved=False):
    """Rotary position embedding of the first 2 * cos.shape[-1] channels (arXiv 2104.09864).

    x         [tokens, heads, head_dim]
    cos, sin  [tokens, rotary_dim / 2]
    interleaved: pairs are (0, 1), (2, 3) ...; otherwise channel i pairs with i + rotary_dim / 2.
    """
    half = cos.shape[-1]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b, c, s = x[..., first], x[..., second], cos[:, None], sin[:, None]
    out = x.copy()
    out[..., first], out[..., second] = a * c - b * s, b * c + a * s
    return out


def cached_attention(q, k, v, cos, sin, past_key, past_value, positions, *,
                     num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale, window=0, layer=0):
    """Rotate q and k, append k and v to the cache, attend causally over all of it with grouped query heads.

    q               [tokens, num_heads * head_dim]   float32, before rotary (after QK norm)
    k, v            [tokens, kv_heads * head_dim]    float32, k before rotary
    cos, sin        [max_position, rotary_dim / 2]   float32
    past_key/value  [kv_heads, past, head_dim]       float32, keys rotated
    positions       [tokens]                         int64, rows of cos and sin
    ->  out                [tokens, num_heads * head_dim]        float32
        present_key/value  [kv_heads, past + tokens, head_dim]   float32
    window: a token sees itself and the window - 1 before it; 0 means all. `layer` names the cache layer and changes nothing here.
    """
    tokens, past = q.shape[0], past_key.shape[1]
    cos, sin = cos[positions, :rotary_dim // 2], sin[positions, :rotary_dim // 2]
    q = rotate(q.reshape(tokens, num_heads, head_dim), cos, sin, interleaved)
    k = rotate(k.reshape(tokens, kv_heads, head_dim), cos, sin, interleaved)
    key = np.concatenate([past_key, k.transpose(1, 0, 2)], axis=1)
    value = np.concatenate([past_value, v.reshape(tokens, kv_heads, head_dim).transpose(1, 0, 2)], axis=1)

    distance = (past + np.arange(tokens))[:, None] - np.arange(past + tokens)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    grouped = q.reshape(tokens, kv_heads, -1, head_dim).transpose(1, 2, 0, 3).astype(np.float64)
    scores = grouped @ key[:, None].swapaxes(2, 3) * scale
    scores[..., hidden] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = (weights @ value[:, None]).transpose(2, 0, 1, 3).reshape(tokens, -1)
    return out.astype(np.float32), key, value
