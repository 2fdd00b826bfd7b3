"""Features at the boundary of structures, for the episodic methods FedDG-ELCFS and SAML.

The contour of a structure is the structure minus its erosion by one pixel, and the ring around it
is its dilation minus the structure. Erosion and dilation use a pixel's four neighbours; outside the
image there is no structure.

Legend: B batch, A feature channels, S structures, H, W height and width, N embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedsgcg.common.errors import fail


def contour_and_ring(masks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return contours and rings of masks (B, S, H, W) bool, of the same shape, as floats.

    Args:
        masks: The structures.
        width: Steps of the dilation, in pixels.
    """
    inside = masks.float()
    outside = F.pad(1 - inside, (1, 1, 1, 1), value=1.0)
    eroded = 1 - _dilated(outside)[..., 1:-1, 1:-1]
    grown = inside
    for _ in range(width):
        grown = _dilated(grown)
    return inside - eroded, grown - inside


def _dilated(masks: Tensor) -> Tensor:
    rows = F.max_pool2d(masks, (3, 1), stride=1, padding=(1, 0))
    columns = F.max_pool2d(masks, (1, 3), stride=1, padding=(0, 1))
    return torch.maximum(rows, columns)


def region_means(features: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Average a feature map over regions.

    Args:
        features: (B, A, H, W).
        regions: (B, S, H, W) floats, 1 inside.

    Returns:
        Means (B, S, A), zero for an empty region, and (B, S) bool, whether a region has a pixel.

    Raises:
        FedsgcgError: TRN-320 when the map has another resolution than the regions.
    """
    if features.shape[2:] != regions.shape[2:]:
        raise fail(
            "TRN-320",
            found=f"a feature map of {tuple(features.shape[2:])}, masks of "
            f"{tuple(regions.shape[2:])}",
            expected="a feature map of full resolution, to read features at boundaries",
            action="use network.features=penultimate or another method",
        )
    size = regions.sum((2, 3))
    total = torch.einsum("bahw,bshw->bsa", features.float(), regions)
    return total / size.clamp(min=1).unsqueeze(2), size > 0


def boundary_contrast(
    embeddings: Tensor, inside: Tensor, valid: Tensor, temperature: float
) -> Tensor:
    """Return the contrast between contours and rings, NT-Xent with two labels.

    For a pair (i, j) of one label: -log( e^(s_ij/tau) / (e^(s_ij/tau) + sum over k of the other
    label of e^(s_ik/tau)) ) with the cosine s, averaged over all pairs.

    Args:
        embeddings: (N, A).
        inside: (N,) bool, True for contours, False for rings.
        valid: (N,) bool, embeddings that exist; others do not count.
        temperature: tau.

    Returns:
        Scalar; 0 without a pair or without a negative.
    """
    unit = F.normalize(embeddings, dim=1, eps=1e-12)
    similarity = unit @ unit.T / temperature
    same, other = _pairs(inside, valid)
    negatives = similarity.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
    negatives = negatives.clamp(min=torch.finfo(similarity.dtype).min)
    losses = F.softplus(negatives - similarity)
    counts = same & other.any(1, keepdim=True)
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def triplet_loss(embeddings: Tensor, inside: Tensor, valid: Tensor, margin: float) -> Tensor:
    """Return the semi-hard triplet loss between contours and rings, with squared distances.

    For a pair (i, j) of one label the negative is the nearest one farther away than j, or the
    farthest if none is: max(0, margin + d_ij - d_ik), averaged over all pairs.

    Args:
        embeddings: (N, A).
        inside: (N,) bool, True for contours, False for rings.
        valid: (N,) bool, embeddings that exist; others do not count.
        margin: In units of a squared distance.

    Returns:
        Scalar; 0 without a pair or without a negative.
    """
    distance = (embeddings.unsqueeze(1) - embeddings.unsqueeze(0)).square().sum(2)
    same, other = _pairs(inside, valid)
    ordered = distance.detach()
    farther = other.unsqueeze(1) & (ordered.unsqueeze(1) > ordered.unsqueeze(2))  # i, j, k
    nearest = ordered.unsqueeze(1).masked_fill(~farther, torch.inf).argmin(2)
    farthest = ordered.masked_fill(~other, -torch.inf).argmax(1, keepdim=True)
    chosen = torch.where(farther.any(2), nearest, farthest.expand_as(nearest))
    negative = distance.gather(1, chosen)
    counts = same & other.any(1, keepdim=True)
    return (F.relu(margin + distance - negative) * counts).sum() / counts.sum().clamp(min=1)


def _pairs(inside: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N, N) bool: pairs of one label, without an embedding itself, and of two labels."""
    both = valid.unsqueeze(0) & valid.unsqueeze(1)
    equal = inside.unsqueeze(0) == inside.unsqueeze(1)
    itself = torch.eye(len(inside), dtype=torch.bool, device=inside.device)
    return both & equal & ~itself, both & ~equal
