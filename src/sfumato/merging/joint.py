"""Another method in the adapters' joint basis: what is compared entry by entry is then in common coordinates.

Both forms work on the factors alone and give factors of at most the sum of the ranks: no dense delta, no SVD of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfumato.merging.factors import Factors, significant_svd

Inner = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""A method on dense deltas, such as `functools.partial(ties, density=0.5)`."""


def knots(terms: Sequence[Factors], weights: Sequence[float], inner: Inner) -> Factors:
    """KnOTS, Stoica et al. 2024 (arXiv 2410.19735), section 4: [delta_1 ... delta_K] = U S [V_1' ... V_K'], merge V_i.

    The result is U inner(S V_1', ..., S V_K'): the authors' code (gstoica27/KnOTS, task_merger.py) scales V before its
    entries are compared, so that those of a negligible direction do not count like those of the strongest. With a
    linear `inner` it is the weighted sum. The SVD is that of the ups' QR times the block diagonal of the downs', of the
    size of the sum of ranks.
    """
    q, r = torch.linalg.qr(torch.cat([term.up.double() for term in terms], 1))
    rights, blocks, start = [], [], 0
    for term in terms:
        right, left = torch.linalg.qr(term.down.double().T)
        blocks.append(r[:, start : start + term.rank] @ left.T)
        rights.append(right)
        start += term.rank
    u, s, vh = significant_svd(torch.cat(blocks, 1))
    components, start = [], 0
    for right in rights:
        components.append(s[:, None] * vh[:, start : start + right.shape[1]] @ right.T)
        start += right.shape[1]
    return Factors(q @ u, inner(components, weights))


def core_space(terms: Sequence[Factors], weights: Sequence[float], inner: Inner) -> Factors:
    """Core space, Panariello et al. 2025 (arXiv 2509.17786), section 3: U inner(U' delta_i V) V'.

    U and V are the orthonormal bases of all ups and of all downs, so that nothing of any delta is lost; the cores are
    at most R x R, R the sum of the ranks.
    """
    left = significant_svd(torch.cat([term.up.double() for term in terms], 1))[0]
    right = significant_svd(torch.cat([term.down.double() for term in terms]))[2]
    cores = [(left.T @ term.up.double()) @ (term.down.double() @ right.T) for term in terms]
    return Factors(left, inner(cores, weights) @ right)
