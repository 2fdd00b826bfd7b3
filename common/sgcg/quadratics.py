"""The quadratic term q' Sigma_k q / (2 tau^2) of the SgCG loss and its gradient.

There are three forms of the covariance: full, diagonal, and none.

Legend: K classes, A feature channels, n pixels of a chunk, q features, tau temperature.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["QUADRATICS"]


class Full:
    """The full covariance; the products Sigma_k q of a chunk are kept for its gradient."""

    def __init__(self, covariance: Tensor, temperature: float) -> None:
        # K products with contiguous results: a single product with [Sigma_1 | ... | Sigma_K] is
        # faster, but the passes over its strided result cost more than that saves.
        self.matrices = covariance.unbind(0)
        self.half = covariance.new_full(covariance.shape[1:2], 0.5 / temperature**2)
        self._allocate(0)

    def _allocate(self, n: int) -> None:
        K, A = len(self.matrices), len(self.half)
        self.products = self.half.new_empty(K, n, A).unbind(0)
        self.scratch = self.half.new_empty(n, A)
        self.terms = self.half.new_empty(K, n)
        self.rows = self.terms.unbind(0)

    def evaluate(self, q: Tensor) -> Tensor:
        """Return (K, n) terms q' Sigma_k q / (2 tau^2) of q (n, A), valid until the next call."""
        if len(q) != len(self.scratch):
            self._allocate(len(q))
        for matrix, product, term in zip(self.matrices, self.products, self.rows, strict=True):
            torch.mm(q, matrix, out=product)
            torch.mv(torch.mul(product, q, out=self.scratch), self.half, out=term)
        return self.terms

    def gradient(self, p: Tensor, q: Tensor, out: Tensor) -> Tensor:
        """Write sum_k p_k Sigma_k q to `out` (n, A), q of the last `evaluate`, p (K, n)."""
        shares = p[:, :, None].unbind(0)
        torch.mul(self.products[0], shares[0], out=out)
        for product, share in zip(self.products[1:], shares[1:], strict=True):
            out.addcmul_(product, share)
        return out


class Diagonal:
    """Only the diagonal of the covariance, as in SePiCo's code."""

    def __init__(self, covariance: Tensor, temperature: float) -> None:
        self.variances = covariance.diagonal(dim1=1, dim2=2)
        self.half = self.variances * (0.5 / temperature**2)

    def evaluate(self, q: Tensor) -> Tensor:
        """Return (K, n) terms of q (n, A)."""
        return self.half @ (q * q).T

    def gradient(self, p: Tensor, q: Tensor, out: Tensor) -> Tensor:
        """Write sum_k p_k diag(Sigma_k) q to `out`."""
        return torch.mm(p.T, self.variances, out=out).mul_(q)


class Absent:
    """No covariance: prototype cross-entropy."""

    def __init__(self, covariance: Tensor, temperature: float) -> None:
        self.num_classes = covariance.shape[0]

    def evaluate(self, q: Tensor) -> Tensor:
        """Return (K, n) zeros."""
        return q.new_zeros(self.num_classes, q.shape[0])

    def gradient(self, p: Tensor, q: Tensor, out: Tensor) -> Tensor:
        """Write zeros to `out`."""
        return out.zero_()


QUADRATICS: Final[dict[str, type[Full | Diagonal | Absent]]] = {
    "full": Full,
    "diagonal": Diagonal,
    "none": Absent,
}
