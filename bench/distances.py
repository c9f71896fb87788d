"""Distances between two sets of features whose pictures belong together, pair by pair."""

from __future__ import annotations

from torch import Tensor


def paired_kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID of features (n, d) and (n, d) of the same n things: the squared MMD of Gretton et al. 2012, eq. 4, with KID's
    kernel (x.y/d + 1)^3 (Binkowski et al. 2018).

    a[i] and b[i] are not compared: that they show the same thing would make any two such sets look near, the more so
    the fewer they are. Zero on average for two sets of one distribution, so that single figures may be below zero.
    """
    a, b = a.double(), b.double()
    n, d = a.shape
    total = sum(s * ((x @ y.T / d + 1) ** 3).fill_diagonal_(0).sum() for x, y, s in ((a, a, 1), (b, b, 1), (a, b, -2)))
    return float(total / (n * (n - 1)))
