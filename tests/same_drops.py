"""Two runs of a model that drop the same tokens, so that the second can be compared with the first to the end.

Left to itself the second soon holds other tokens, whose scores nearly equal: of nano with int4 pages two levels of the CPU's own
instructions agree on 60 % of a head's tokens at worst (key_diff, whose scores differ by 0.04 of their deviation), and logits differ by
0.025. Where one follows the other, scores differ as little at the last drop as at the first, and logits by 0.015.
"""
import numpy as np

from edgeattn.cache import eviction
from edgeattn.page_formats import PAGE


class SameDrops:
    """Records what a run drops; after `follow()` the next run drops that. apart: root-mean-square differences of the two runs' scores at
    each drop, in standard deviations."""

    def __init__(self, monkeypatch):
        self.apart, self._scores, self._limits, self._patch = [], [], [], monkeypatch
        self._drop, self._share = eviction._drop, eviction.share_limits
        self._replace(self._record, self._note)

    def follow(self):
        self._replace(self._repeat, self._share_alike)

    def finish(self):
        """That the second run has dropped all that the first had."""
        assert self.apart and not self._scores and not self._limits

    def _replace(self, drop, share):
        self._patch.setattr(eviction, "_drop", drop)
        self._patch.setattr(eviction, "share_limits", share)

    def _note(self, cache, sequence):
        self._limits.append(self._share(cache, sequence))
        return self._limits[-1]

    def _share_alike(self, cache, sequence):
        """Limits are whole pages, so that one more or less is a rounded digit."""
        limits = self._limits.pop(0)
        assert np.abs(limits - self._share(cache, sequence)).max() <= PAGE
        return limits

    def _record(self, cache, sequence, view, head, i, scores):
        self._scores.append((view.layer, head, view.positions[i].copy(), scores.copy()))
        return self._drop(cache, sequence, view, head, i, scores)

    def _repeat(self, cache, sequence, view, head, i, scores):
        layer, of, positions, theirs = self._scores.pop(0)
        assert (layer, of) == (view.layer, head)
        np.testing.assert_array_equal(view.positions[i], positions)
        self.apart.append(float(np.sqrt(np.square(theirs - scores).mean()) / scores.std()))
        return self._drop(cache, sequence, view, head, i, theirs)
