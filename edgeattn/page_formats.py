"""How the keys and values of 32 tokens of one KV head lie in a page, byte by byte: the same on every device.

A page is made of rows of 32 values. A row of K is one channel of all the tokens; a row of V is 32 channels of one token.
    f32, f16   K [head_dim][32], V [32][width]                                     width: head_dim, up to a multiple of 32
Quantised rows stand in quads, four rows together, so that a dot product of four bytes is a step: byte 4 * i + j of 64 belongs to row j
of the quad and to value i of the row, or to value i + 16, called the second half.
    int4       64 bytes: low nibbles the first half, high nibbles the second       rows of V: [block of 32 channels][token]
    int8       the high four bits as int4, all quads, then the low four bits: a reader may leave those out (SpAtten, arXiv 2012.09852)
    int2       64 bytes for two quads: from the low bits on first and second half of the first quad, then of the second
    int3       the low two bits as int2, all quads, then the top bits, 64 bytes for four quads: bit 2 * (quad % 4) + half
Keys as deltas (after DeltaLLM, arXiv 2507.19608; no parameters): a block of channels is written for a token only where one of them is
further than Theta from what was last written; else the block's last values stand. The chain starts anew in every page.
    delta      Theta, float32, no less than any |implied - given|; for each block 32 bits, bit t: written at token t (bit 0 always is);
               zeros up to a multiple of 64 bytes; then for each block [channel][tokens written] halves, one block after the other. There is
               room for all; the rest is zeros. A page with all bits set is, behind its first bytes, a page f16
Parameters are halves, minimum and step, value = minimum + code * step:
    K by channel  [2][head_dim]              one pair for each row (KIVI, arXiv 2402.02750)
    K by token    [groups][2][32 tokens]     a group is 32 channels, or all of them
    V by token    [groups][2][32 tokens]     the same; then, where channels are separated (ZipCache, arXiv 2405.14256), [width] scales
"""
from dataclasses import dataclass, field

PAGE = 32  # tokens
BITS = {"f32": 32, "f16": 16, "int8": 8, "int4": 4, "int3": 3, "int2": 2, "delta": 16}


@dataclass(frozen=True)
class PageFormat:
    """Types of K and V, and what their parameters belong to.

    k_axis      "channel" or "token"
    one_group   parameters by token are shared by all channels, and symmetric: minimum = -2**(bits - 1) * step
    separated   V is divided by a scale for each channel before it is quantised
    threshold   of deltas: Theta over the root mean square of the page's keys
    gate        of deltas: channels of a block, 1, 8 or 16, or 0: all of a token
    refresh     of deltas: a page that would leave out a smaller share of its blocks is written whole
    ValueError: an unknown type or gate, or a type with floats on one side only of the page.
    """
    head_dim: int
    k_type: str = "f16"
    v_type: str = "f16"
    k_axis: str = "channel"
    one_group: bool = False
    separated: bool = False
    threshold: float = field(default=0.0, repr=False)
    gate: int = field(default=16, repr=False)
    refresh: float = field(default=0.0, repr=False)

    def __post_init__(self):
        if self.v_type == "delta":
            raise ValueError("deltas are for keys alone: give values another type")
        if self.gate not in (0, 1, 8, 16):
            raise ValueError(f"gate must be 1, 8 or 16 channels, or 0 for whole tokens, got {self.gate}")
        for kind in (self.k_type, self.v_type):
            if kind not in BITS:
                raise ValueError(f"a KV type must be one of {', '.join(BITS)}, got {kind!r}")

    @property
    def blocks(self) -> int:
        return -(-self.head_dim // PAGE)

    @property
    def width(self) -> int:
        """Channels of V with their padding."""
        return self.blocks * PAGE

    @property
    def groups(self) -> int:
        """Pairs of parameters that a token has, where they go by token."""
        return 1 if self.one_group else self.blocks

    @property
    def k_bytes(self) -> int:
        return self.head_dim * 4 * BITS[self.k_type] + self.delta_head

    @property
    def delta_block(self) -> int:
        """Channels that are written together, where keys are deltas."""
        return self.gate or self.head_dim

    @property
    def delta_head(self) -> int:
        """Bytes before the values, where keys are deltas."""
        return -(-(4 + 4 * self.head_dim // self.delta_block) // 64) * 64 if self.k_type == "delta" else 0

    @property
    def v_bytes(self) -> int:
        return self.width * 4 * BITS[self.v_type]

    @property
    def k_params(self) -> int:
        """Halves of one page."""
        if BITS[self.k_type] >= 16:
            return 0
        return 2 * self.head_dim if self.k_axis == "channel" else 2 * PAGE * self.groups

    @property
    def v_params(self) -> int:
        return 0 if BITS[self.v_type] >= 16 else 2 * PAGE * self.groups + (self.width if self.separated else 0)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: codes and parameters, K and V."""
        return self.k_bytes + self.v_bytes + 2 * (self.k_params + self.v_params)
