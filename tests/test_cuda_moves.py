"""Tokens that change places in pages on a GPU against the same on the host."""
import numpy as np
import pytest
from cuda_device import needs_cuda

from edgeattn.page_formats import PAGE, PageFormat

pytestmark = needs_cuda
RNG = np.random.default_rng()


@pytest.mark.parametrize("kind, head_dim", [("f16", 64), ("f16", 80), ("f32", 128)])
def test_tokens_move_to_earlier_slots(kind, head_dim):
    """As after an eviction, several KV heads at once: what HostPages.move does."""
    def part(own):
        keep = np.sort(RNG.permutation(PAGE * len(own))[:RNG.integers(1, PAGE * len(own))])
        places = [own[slots // PAGE] * PAGE + slots % PAGE for slots in (keep, np.arange(len(keep)))]
        return [x[keep != np.arange(len(keep))] for x in places]
    check_moves(kind, head_dim, "move", lambda numbers: [part(own) for own in np.split(numbers, (20, 21, 28, 58))])


@pytest.mark.parametrize("kind, head_dim", [("f16", 64), ("f16", 80), ("f32", 128)])
def test_tokens_change_places(kind, head_dim):
    """As where pages are sorted before they are quantised: several heads at once, what becomes of that once more."""
    def part(own):
        slots = (own[:, None] * PAGE + np.arange(PAGE)).ravel()
        some = RNG.permutation(slots)[:RNG.integers(0, len(slots) + 1)]
        return some, RNG.permutation(some)
    check_moves(kind, head_dim, "permute", lambda numbers: [[part(numbers[:8]), part(numbers[8:13]), part(numbers[13:15])], [],
                                                            [part(numbers[6:10])], [part(numbers[:2]), part(numbers[2:3])]])


def check_moves(kind, head_dim, name, make):
    from edgeattn.cache.pages import HostPages
    from edgeattn.device_pages import DevicePages
    from edgeattn.kernels_cuda import device
    xp, page_format = device.cupy(), PageFormat(head_dim, kind, kind)
    pages, host, parts = DevicePages(page_format, 60, xp.cuda.Stream()), HostPages(page_format, 60), make(RNG.permutation(60))
    for array, copy in zip(pages.arrays().values(), host.arrays().values()):
        copy[:] = RNG.integers(0, 256, copy.shape)
        array[:] = xp.asarray(copy)
    xp.cuda.Device().synchronize()
    before = host.k.copy()
    for where in (pages, host):
        getattr(where, name)(parts)
    for array, copy in zip(pages.arrays().values(), host.arrays().values()):
        np.testing.assert_array_equal(array.get(), copy)
    assert (host.k != before).any()
