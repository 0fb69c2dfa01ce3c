"""What a series of answers or losses says of all that might have been asked, and what two series over the same questions differ by.

Values stand in clusters: the questions of one haystack, the tokens' mean of one window. What shares a cluster is not independent.
"""
from math import sqrt

import numpy as np

Z = 1.959964       # of a 95 % interval
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # the same of few degrees of freedom


def design_effect(clusters) -> float:
    """By how much more values one would need than if they were independent, at least 1: the variance of the mean between clusters over that
    of as many independent values (Rao and Scott, Biometrics 48, 1992, 577-585), and where that is more than 1, a factor for its being
    known from few clusters only (Korn and Graubard, Survey Methodology 24, 1998, 193-201). At most what it is where all values of a
    cluster are the same. clusters: lists of numbers, two of them at least."""
    every = np.concatenate(clusters)
    independent, alike = every.var() / every.size, sum(len(values) ** 2 for values in clusters) / every.size
    found = standard_error(clusters) ** 2 / independent if independent else 1.0
    return min(alike, found * (student(len(clusters) - 1) / Z) ** 2) if found > 1 else 1.0


def share(right) -> tuple[float, float | None, float | None]:
    """Share of what is right and its 95 % interval, None with fewer than two clusters. right: lists of 0 and 1."""
    every = np.concatenate(right)
    found = float(every.mean())
    return found, *(wilson(found, every.size / design_effect(right)) if len(right) > 1 else (None, None))


def difference(right, base) -> tuple[float, float | None, float | None]:
    """Share right less the base's over the same questions, and its 95 % interval, None with fewer than two clusters; arguments are lists of
    0 and 1.

    Newcombe's method 10 for paired proportions (Statistics in Medicine 17, 1998, 2635-2650), which has a width even where no answer
    changes. It takes pairs as independent; those of one cluster are not, so their number is divided by the design effect.
    """
    changes = [np.subtract(a, b) for a, b in zip(right, base, strict=True)]
    a, b = np.concatenate(right), np.concatenate(base)
    both, gained, lost, neither = (a * b).sum(), (a * (1 - b)).sum(), ((1 - a) * b).sum(), ((1 - a) * (1 - b)).sum()
    if len(changes) < 2:
        return float((a - b).mean()), None, None
    deff = design_effect(changes)
    return float((a - b).mean()), *paired_interval(*(x / deff for x in (both, gained, lost, neither)))


def paired_interval(both: float, gained: float, lost: float, neither: float) -> tuple[float, float]:
    """Newcombe's method 10: limits of (both + gained) / n - (both + lost) / n."""
    n = both + gained + lost + neither
    p1, p2 = (both + gained) / n, (both + lost) / n
    (low1, high1), (low2, high2) = wilson(p1, n), wilson(p2, n)
    product = p1 * (1 - p1) * p2 * (1 - p2) * n ** 4
    dependence = both * neither - gained * lost
    phi = (max(dependence - n / 2, 0) if dependence > 0 else dependence) / sqrt(product) if product else 0

    def reach(down, up):
        return sqrt(max(0, down ** 2 - 2 * phi * down * up + up ** 2))
    return p1 - p2 - reach(p1 - low1, high2 - p2), p1 - p2 + reach(p2 - low2, high1 - p1)


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a share p of n."""
    middle, half = p + Z ** 2 / (2 * n), Z * sqrt(p * (1 - p) / n + Z ** 2 / (4 * n * n))
    return (middle - half) / (1 + Z ** 2 / n), (middle + half) / (1 + Z ** 2 / n)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: looked up, or Fisher's expansion (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    terms = Z, (Z ** 3 + Z) / 4, (5 * Z ** 5 + 16 * Z ** 3 + 3 * Z) / 96, (3 * Z ** 7 + 19 * Z ** 5 + 17 * Z ** 3 - 15 * Z) / 384
    return sum(term / freedom ** power for power, term in enumerate(terms))


def mean(clusters) -> tuple[float, float | None, float | None]:
    """Mean of all values and its 95 % interval, by Student's t over the clusters' means, each of its own size; None with fewer than two of
    them. clusters: lists of numbers. Of paired series, give the differences."""
    found = float(np.concatenate(clusters).mean())
    if len(clusters) < 2:
        return found, None, None
    reach = student(len(clusters) - 1) * standard_error(clusters)
    return found, found - reach, found + reach


def standard_error(clusters) -> float:
    """Of the mean of all values, from what clusters, two at least, differ by: the variance of a ratio of sums, linearised. Clusters of one
    size make it the usual one of their means."""
    sizes, sums = (np.array([f(values) for values in clusters], float) for f in (len, np.sum))
    count, found = len(sizes), sums.sum() / sizes.sum()
    return sqrt(((sums - found * sizes) ** 2).sum() / (count - 1) * count) / sizes.sum()
