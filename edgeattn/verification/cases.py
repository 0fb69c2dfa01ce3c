"""Small random inputs for every operator: what the device's kernels are compared with their NumPy references on."""
import numpy as np

from edgeattn.ops import load_kernel
from edgeattn.reference.matmul_nbits import pack_panels, quantise_activations
from edgeattn.reference.matmul_ternary import pack_ternary


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def quantised(rng, n, k, bits, size, zeros=False):
    """Random panels of codes, scales, zero points (`zeros` "half": floats between the codes); weights of about 1 in size."""
    blocks = -(-k // size)
    q, points = (rng.integers(0, 1 << bits, shape, np.uint8) for shape in ((n, k), (n, blocks)))
    if zeros == "half":
        points = points + rng.random(points.shape)
    return pack_panels(q, (rng.random((n, blocks)) + 0.5) / (1 << bits), points if zeros else None, bits=bits, block_size=size)


def matmul_nbits_case(rng, tokens, n, k, bits, size, zeros, bias):
    """Activations already rounded as the kernel rounds them, so that the exact reference is what it must give."""
    x = quantise_activations(normal(rng, tokens, k), size)
    return (x, *quantised(rng, n, k, bits, size, zeros), normal(rng, n) if bias else None), dict(bits=bits, block_size=size, K=k, N=n)


def matmul_ternary_case(rng, tokens, n, k, bits, activation_bits, bias, input_major=0):
    codes = pack_ternary(rng.integers(-1, 2, (n, k), np.int8), bits=bits, input_major=input_major)
    x = normal(rng, tokens, k) * rng.lognormal(size=(tokens, 1)).astype(np.float32)
    x[:, rng.random(k) < 0.5] = 0
    x[-1] = 0
    x[0, 0] = 5
    return (x, codes, (rng.random(n) + 0.5).astype(np.float32), normal(rng, n) if bias else None), dict(
        bits=bits, activation_bits=activation_bits, K=k, N=n, input_major=input_major)


def embedding_nbits_case(rng, tokens, n, k, bits, size, zeros):
    return (rng.integers(0, n, tokens), *quantised(rng, n, k, bits, size, zeros)), dict(bits=bits, block_size=size, K=k, N=n)


def logits(rng, vocab, spread, rounded=False):
    """Rounded ones hold many ties, where the lower token comes first."""
    x = normal(rng, vocab) * np.float32(spread)
    return x.round() if rounded else x


def attention(rng, past, tokens, heads=6, kv_heads=2, head_dim=64, rotary_dim=None, window=0, interleaved=0):
    rotary_dim = rotary_dim or head_dim
    cos, sin = normal(rng, past + tokens, rotary_dim // 2), normal(rng, past + tokens, rotary_dim // 2)
    args = (normal(rng, tokens, heads * head_dim), normal(rng, tokens, kv_heads * head_dim), normal(rng, tokens, kv_heads * head_dim),
            np.clip(cos, -1, 1), np.clip(sin, -1, 1), normal(rng, kv_heads, past, head_dim), normal(rng, kv_heads, past, head_dim),
            np.arange(past, past + tokens))
    return args, dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved,
                      scale=head_dim ** -0.5, window=window, layer=0)


PAGE_FORMATS = [(64, "int4", "int4"), (128, "int8", "int2"), (16, "int3", "int3"), (80, "int2", "int8"), (64, "int4", "int4", "token"),
                (48, "int3", "int3", "token", 1), (96, "int3", "int2", "token", 1), (64, "int2", "int4", "channel", 0, 1),
                (80, "int3", "int3", "channel", 0, 1), (80, "int3", "int8", "token"), (64, "int3", "int4", "token")]
DELTAS = [(64, 1.3, 16, 0.3), (80, 1.0, 16, 0.0), (64, 0.0, 8, 0.0), (128, 1.5, 0, 0.1), (16, 1.0, 1, 0.5), (48, 2.0, 8, 0.3)]


def selection_case(rng, past, score, combine, budget, reach, head_dim=64, heads=8, kv_heads=2):
    args, about = attention(rng, past, 1, heads, kv_heads, head_dim)
    q, _, _, cos, sin, key, _, positions = args
    del about["window"]
    return (q, cos, sin, key, positions), about | dict(capacity=70, score=score, combine=combine, budget=budget, fraction=0.1, recent=3,
                                                       reach=reach)


def index_case(rng, past, score, budget, about, combine="head", head_dim=64, heads=8, kv_heads=2):
    """Keys with a mean, of which a few stand out."""
    (q, cos, sin, key, positions), options = selection_case(rng, past, score, combine, budget, 1.0, head_dim, heads, kv_heads)
    key[:, :, :head_dim // 8] += 2
    key[:, rng.integers(0, past, past // 20)] *= 2
    vectors = None
    if score == "components":
        vectors = np.linalg.qr(rng.standard_normal((kv_heads, head_dim, head_dim)))[0].astype(np.float32)
    if score == "collisions":
        vectors = normal(rng, about["tables"], about["bits"], head_dim)
    return (q, cos, sin, key, positions, vectors), options | about


def formats(k_type, v_type, k_axis="channel", one_group=0, separated=0):
    return dict(k_type=k_type, v_type=v_type, k_axis=k_axis, one_group=one_group, separated=separated)


def pages_case(rng, head_dim):
    """Keys and values with outlier channels, constant rows, zeros and tiny values."""
    k, v = rng.standard_normal((5, head_dim, 32), np.float32), rng.standard_normal((5, 32, head_dim), np.float32)
    k[:, 3] *= 10
    v[:, :, 5] *= 10
    k[1, 1], v[1, 1], k[2], v[2], k[3], v[3] = 0.1, 0.1, 0, 0, k[3] * np.float32(1e-5), v[3] * np.float32(1e-5)
    return k, v


def deltas_case(rng, head_dim, threshold, gate, refresh):
    """Keys that move now and then, some pages hardly and some all the time."""
    k, v = pages_case(rng, head_dim)
    moving = rng.random((5, head_dim, 32)) < rng.random((5, 1, 1))
    k = np.cumsum(k * moving, 2, dtype=np.float32)
    return (k, v), dict(k_type="delta", v_type="int4", threshold=threshold, gate=gate, refresh=refresh)


def read_deltas_case(rng, head_dim, *options):
    (k, v), about = deltas_case(rng, head_dim, *options)
    sealed = load_kernel("seal_pages", "reference")(k, v, **about)
    return sealed, dict(head_dim=head_dim, k_type="delta", v_type="int4", gate=about["gate"])


def read_pages_case(rng, head_dim, *kind):
    return load_kernel("seal_pages", "reference")(*pages_case(rng, head_dim), **formats(*kind)), dict(head_dim=head_dim, **formats(*kind))


def estimate_case(rng, heads, kv_heads, tokens, keys, head_dim, stride=0, bits=0):
    """Keys with a mean; a token of zeros, an outlier."""
    q, k = normal(rng, heads, tokens, head_dim), normal(rng, kv_heads, keys, head_dim) + 2 * normal(rng, kv_heads, 1, head_dim)
    q[:, tokens // 2], k[:, keys // 2], k[:, keys // 3] = 0, 0, k[:, keys // 3] * 8
    about = dict(scale=head_dim ** -0.5)
    if stride:
        return (q, k, k.mean(1)), about | dict(stride=stride)
    return (q, k, q.mean(1), k.mean(1), normal(rng, heads, tokens)), about | dict(bits=bits)


ESTIMATES = [(4, 1, 512, 4096, 64), (4, 2, 64, 96, 16), (2, 1, 70, 133, 32), (7, 1, 5, 77, 128), (2, 2, 1, 9, 64), (6, 2, 200, 3003, 80),
             (1, 1, 100, 2100, 256), (3, 3, 33, 40, 48), (2, 1, 300, 2201, 32)]  # heads, KV heads, queries, keys, head_dim

# One entry an operator: a list of (id, build, tolerance). build(Generator) -> (arguments, attributes); the tolerance is absolute.
CASES = {
    "add": [
        ("one", lambda rng: ((rng.standard_normal((1, 1), np.float32),) * 2, {}), 0),
        ("ragged", lambda rng: ((rng.standard_normal((5, 77), np.float32), rng.standard_normal((5, 77), np.float32)), {}), 0),
    ],
    "embedding": [
        ("f32", lambda rng: ((rng.integers(0, 9, 5), normal(rng, 9, 77)), {}), 0),
        ("f16-many", lambda rng: ((rng.integers(0, 50, 300), normal(rng, 50, 576).astype(np.float16)), {}), 0),
    ],
    "gather_rows": [
        ("one", lambda rng: ((normal(rng, 3, 1), np.array([2])), {}), 0),
        ("ragged", lambda rng: ((normal(rng, 9, 77), rng.integers(0, 9, 5)), {}), 0),
    ],
    "gather_columns": [
        ("one", lambda rng: ((normal(rng, 3, 1), np.array([0])), {}), 0),
        ("all", lambda rng: ((normal(rng, 5, 577), rng.permutation(577)), {}), 0),
        ("some-many", lambda rng: ((normal(rng, 130, 700), rng.integers(0, 700, 900)), {}), 0),
    ],
    "rms_normalization": [  # values up to 4 or so, where float32 steps are 2.4e-7 to 4.8e-7
        ("one", lambda rng: ((normal(rng, 1, 1), normal(rng, 1)), dict(epsilon=1e-6)), 1e-6),
        ("ragged", lambda rng: ((normal(rng, 5, 77), normal(rng, 77)), dict(epsilon=1e-5)), 2e-6),
        ("heads", lambda rng: ((normal(rng, 200, 9, 64), normal(rng, 64)), dict(epsilon=1e-5)), 4e-6),
    ],
    "cached_attention": [  # float32 sums of up to 1,000 weighted values of size 1; more in test_attention.py
        (name, lambda rng, o=options: attention(rng, **o), 4e-6) for name, options in (
            ("decode", dict(past=1000, tokens=1)), ("prefill", dict(past=33, tokens=70)), ("first", dict(past=0, tokens=1)),
            ("window", dict(past=100, tokens=40, window=50)), ("interleaved", dict(past=5, tokens=9, interleaved=1)),
            ("partial-rotary", dict(past=5, tokens=9, head_dim=80, rotary_dim=40)))],
    "sample": [
        (name, lambda rng, n=vocab, x=spread, r=rounded, o=options: (
            (logits(rng, n, x, r), rng.integers(0, n, 20)), dict(
                dict(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.1, uniform=float(rng.random())), **o)), 0)
        for name, vocab, spread, rounded, options in (
            ("greedy", 1000, 3, True, dict(temperature=0.0)), ("all", 3000, 1, False, {}), ("ties", 3000, 3, True, {}),
            ("top-k", 3000, 3, True, dict(top_k=40)), ("top-p", 3000, 1, False, dict(top_p=0.9)),
            ("top-p-peaked", 3000, 30, False, dict(top_p=0.5)), ("min-p", 3000, 2, True, dict(min_p=0.05)),
            ("chain", 150_000, 3, False, dict(top_k=200, top_p=0.95, min_p=0.02)), ("one", 1, 1, False, dict(top_k=5)))],
    "linear": [  # float32 sums of K products: a few 1e-7 of sqrt(K), the size of the outputs
        (f"{tokens}x{k}x{n}-{np.dtype(dtype).name}", lambda rng, t=tokens, k=k, n=n, d=dtype: (
            (normal(rng, t, k), normal(rng, n, k).astype(d), normal(rng, n) if n % 2 else None), {}), 4e-6 * k ** 0.5)
        for tokens, k, n in ((1, 1, 1), (1, 77, 67), (3, 100, 67), (4, 2048, 66), (5, 77, 5), (30, 515, 65), (100, 576, 576))
        for dtype in (np.float32, np.float16)],
    "gated_activation": [(activation, lambda rng, a=activation: ((normal(rng, 70, 2 * 301) * 5,), dict(activation=a)), tolerance)
                         for activation, tolerance in (("silu", 5e-5), ("gelu_tanh", 5e-5), ("relu2", 5e-4))],  # values up to 400; 8,000
    "matmul_nbits": [  # float32 sums over blocks: a few 1e-7 of sqrt(K), the size of the outputs
        ("x".join(map(str, c[:5])) + ("-zeros" if c[5] else "") + ("-half" if c[5] == "half" else "") + ("-bias" if c[6] else ""),
         lambda rng, c=c: matmul_nbits_case(rng, *c), 2e-6 * c[2] ** 0.5)
        for c in (  # tokens, N, K, bits, block size, zero points, bias: one, few and many tokens; odd panels; K not whole blocks
            (1, 64, 256, 4, 32, False, False), (1, 2050, 2048, 4, 32, False, True), (2, 33, 100, 4, 16, True, True),
            (5, 40, 1100, 4, 32, False, True), (70, 600, 2080, 4, 64, True, False), (7, 16, 77, 4, 256, False, False),
            (1, 77, 500, 8, 32, False, True), (4, 48, 2304, 8, 256, True, False), (13, 100, 1300, 8, 32, False, True),
            (6, 50, 100, 8, 16, True, True), (300, 96, 512, 4, 128, False, False),
            (1, 2050, 2048, 2, 32, False, True), (3, 33, 100, 2, 16, True, True), (70, 600, 2080, 2, 64, "half", False),
            (7, 40, 77, 2, 16, False, True), (1, 77, 500, 2, 128, "half", True), (4, 48, 2304, 2, 256, True, False),
            (1, 1030, 2080, 3, 32, False, True), (3, 33, 100, 3, 64, True, True), (70, 600, 2080, 3, 128, "half", False),
            (7, 40, 77, 3, 32, True, True), (4, 48, 2304, 3, 256, False, False), (2, 50, 200, 4, 32, "half", True),
            (9, 50, 200, 8, 64, "half", False))],
    "matmul_ternary": [  # sums of integers are exact; a few roundings of float32 after them, of outputs up to 5 standard deviations
        ("x".join(map(str, c[:5])) + ("-bias" if c[5] else "") + ("-inputs" if c[6:] else ""),
         lambda rng, c=c: matmul_ternary_case(rng, *c), 1e-5 * c[2] ** 0.5)
        for c in (  # tokens, N, K, bits, activation bits, bias, input-major
            (2, 16, 16, 2, 8, False), (1, 2050, 2048, 2, 8, True), (3, 33, 100, 2, 8, True), (4, 200, 6912, 2, 8, False),
            (5, 40, 1100, 2, 8, True), (70, 600, 2560, 2, 8, False), (13, 100, 77, 2, 4, True), (1, 50, 700, 2, 4, False),
            (2, 16, 16, 1, 8, False), (1, 2050, 2048, 1, 8, True), (3, 33, 100, 1, 8, True), (4, 200, 6912, 1, 8, False),
            (5, 40, 1100, 1, 8, True), (70, 600, 2560, 1, 4, False), (1, 50, 700, 1, 4, False), (9, 50, 6912, 1, 8, False),
            (1, 2050, 1000, 2, 8, True, 1), (1, 16, 16, 2, 8, False, 1), (3, 300, 77, 2, 4, True, 1), (50, 600, 2560, 2, 8, False, 1),
            (7, 40, 1100, 2, 8, True, 1))],
    "embedding_nbits": [  # one multiplication
        ("x".join(map(str, c[:5])) + ("-zeros" if c[5] else ""), lambda rng, c=c: embedding_nbits_case(rng, *c), 1e-6)
        for c in ((1, 16, 64, 4, 32, False), (300, 90, 100, 8, 32, False), (9, 33, 77, 4, 16, True), (5, 40, 600, 8, 256, True),
                  (20, 33, 77, 2, 16, True), (9, 40, 100, 2, 64, "half"), (20, 33, 77, 3, 32, False), (9, 40, 600, 3, 256, "half"))],
    "select_pages": [("-".join(map(str, c)), lambda rng, c=c: selection_case(rng, *c), 0) for c in (
        (2000, "bound", "head", 500, 1.0), (2000, "bound", "layer", 500, 0.5), (777, "mass", "head", 300, 1.0),
        (777, "mass", "layer", 300, 1.0), (1999, "recency", "head", 100, 1.0), (2015, "bound", "head", 3000, 1.0),
        (40, "bound", "head", 32, 1.0), (1, "bound", "head", 32, 1.0), (991, "bound", "head", 200, 0.4, 128, 12, 2),
        (1000, "bound", "head", 300, 0.7, 80, 4, 4), (640, "mass", "head", 200, 1.0, 16, 10, 2),
        *((past, score, combine, budget, 1.0, *shape) for score, combine in (("peak", "head"), ("rank", "best"), ("max_mass", "layer"))
          for past, budget, *shape in ((2000, 500), (1279, 300, 128, 12, 2), (640, 200, 16, 10, 2), (1500, 300, 80, 4, 4), (40, 32))))]
    + [("-".join(map(str, c)), lambda rng, c=c: index_case(rng, *c), 0) for c in (
        (2000, "hierarchy", 500, dict(blocks=7)), (2000, "hierarchy", 900, dict(blocks=4)),
        (1333, "hierarchy", 300, dict(blocks=99), "layer", 80),
        (2047, "representatives", 700, dict(block=4), "layer"), (1999, "representatives", 300, dict(block=4), "head", 16, 6, 3),
        (2000, "landmarks", 500, dict(block=2)), (1500, "landmarks", 400, dict(block=3), "layer", 128, 4, 4),
        (2000, "components", 500, dict(rank=16)), (1200, "components", 300, dict(rank=80), "layer", 80, 12, 2),
        (2000, "collisions", 1500, dict(tables=16, bits=8)), (1000, "collisions", 300, dict(tables=10, bits=5), "head", 48, 6, 2),
        (2000, "collisions", 500, dict(tables=4, bits=8), "layer"), (230, "collisions", 160, dict(tables=4, bits=2)))],
    "antidiagonal_weights": [  # float32 sums of weights, up to 64 of them
        ("-".join(map(str, (*c, stride))), lambda rng, c=c, s=stride: estimate_case(rng, *c, stride=s), 2e-5)
        for c, strides in zip(ESTIMATES, ((8, 16), (8, 1), (16, 2), (8, 32), (8, 4), (32, 16), (2, 8), (4, 8), (8, 32)), strict=True)
        for stride in strides],
    "score_excess": [  # scores up to 60
        ("-".join(map(str, (*c, bits))), lambda rng, c=c, b=bits: estimate_case(rng, *c, bits=b), 3e-5)
        for c in ESTIMATES for bits in (4, 8)],
    "seal_pages": [("-".join(map(str, c)), lambda rng, c=c: (pages_case(rng, c[0]), formats(*c[1:])), 0) for c in PAGE_FORMATS]
    + [("-".join(map(str, ("delta", *c))), lambda rng, c=c: deltas_case(rng, *c), 0) for c in DELTAS],
    "read_pages": [("-".join(map(str, c)), lambda rng, c=c: read_pages_case(rng, *c), 2e-5) for c in PAGE_FORMATS]  # values up to 40
    + [("-".join(map(str, ("delta", *c))), lambda rng, c=c: read_deltas_case(rng, *c), 2e-5) for c in DELTAS],
}
