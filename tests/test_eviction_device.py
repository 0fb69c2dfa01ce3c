"""Eviction policies where keys and values lie on a device: NumPy's functions compute there, and nothing mixes the two places."""
from dataclasses import replace

import numpy as np
import pytest
from test_eviction import random_view

from edgeattn.cache.options import evictions
from edgeattn.policies import load_policy


class There(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that is as strict as CuPy's: with arrays of NumPy it does not compute, and becomes one by get() alone."""

    def __init__(self, x):
        self.x = x

    def get(self):
        return self.x

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a NumPy array")

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return kept(getattr(ufunc, method)(*(taken(x) for x in inputs), **options))

    def __array_function__(self, function, types, args, options):
        if function is np.asarray:
            return There(np.asarray(*(x.x if isinstance(x, There) else x for x in args), **options))
        return kept(function(*(taken(x) for x in args), **{name: taken(x) for name, x in options.items()}))

    def __getitem__(self, key):
        return kept(self.x[taken(key) if isinstance(key, There) else key])

    def __len__(self):
        return len(self.x)

    def __bool__(self):
        return bool(self.x)

    def __getattr__(self, name):
        if name.startswith("__"):  # how NumPy would reach the memory
            raise AttributeError(name)
        found = getattr(self.x, name)
        return (lambda *args, **options: kept(found(*args, **options))) if callable(found) else found


def kept(x):
    return There(x) if isinstance(x, (np.ndarray, np.generic)) else x


def taken(x):
    if isinstance(x, np.ndarray):
        raise TypeError("an array of NumPy among arrays of a device")
    return x.x if isinstance(x, There) else x


def test_arrays_of_two_places_do_not_mix():
    here, there = np.ones(3), There(np.ones(3))
    for mixed in (lambda: here + there, lambda: there @ here, lambda: np.where(there > 0, there, here), lambda: np.asarray(there)):
        with pytest.raises(TypeError):
            mixed()
    np.testing.assert_array_equal((np.asarray(here, like=there) + there).get(), 2)


CASES = [*((name, {}) for name in evictions()), *(("caote", {"base": name, "fast": fast}) for name in evictions() if name != "caote"
                                                   for fast in (False, True))]


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_scores_are_those_of_the_host(name, options):
    policy, view = load_policy("eviction", name, options), random_view(np.random.default_rng())
    found = policy.scores(replace(view, k=There(view.k), v=There(view.v)))
    np.testing.assert_allclose(found.get() if hasattr(found, "get") else found, policy.scores(view), rtol=1e-6, atol=1e-6)
