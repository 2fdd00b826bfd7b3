"""SegCLR: supervised and contrastive learning of one network, jointly (arXiv 2405.05336).

    L = 1/2 (L_con(source) + L_con(target)) + lambda L_sup(source),  lambda = 20 (section II-C)

L_con is the contrastive loss of the projections of the encoder's deepest map, L_sup the supervised
loss of this project. In a federation every hospital minimises its own terms: one with labels
1/2 L_con + lambda L_sup, one of role `unlabelled` 1/2 L_con. A client with several domains (pooled
training) uses the mean of L_con over its domains, each with negatives of its own domain only, so
that distinguishing domains does not lower the loss. With `global_negatives` the negatives are the
Gaussian of the other hospitals' projections (`global_nt_xent`). See docs/explanation/segclr.md.

Legend: B pairs, d length of a projection, C channels, S image side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.device import autocast_for
from fedsgcg.clients.methods.base import Loss, Source
from fedsgcg.clients.methods.guidance import Guidance, Guide
from fedsgcg.common.heads import head
from fedsgcg.common.networks import UNet


class SegCLR(Source):
    """SegCLR: supervised and contrastive learning jointly, also at hospitals without masks.

    Formula: L = 1/2 (L_con(source) + L_con(target)) + 20 L_supervised, with NT-Xent or SimSiam of
        two views' projections of the deepest map; a term is left out where a batch has no labels or
        no pairs.
    Leaves: weights, those of the projection heads included; of a hospital without masks only the
        encoder and the heads count. With global_negatives also count, mean and covariance of the
        projections of its slices, of which another hospital receives a merge of all others'.
    Defaults: weight 20 as published; temperature, widths, augmentation and the distance of slices
        are this project's choices, because the paper does not state them.
    Source: SegCLR, arXiv 2405.05336; SimCLR, arXiv 2002.05709; SimSiam, arXiv 2011.10566.
    """

    pairs = True

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the terms that the batch allows.

        With pairs alone 1/2 L_con (a site without labels, or pre-training), with labels alone L_sup
        (fine-tuning), with both the joint loss.
        """
        if batch.pairs is None:
            return super().loss(batch, guide)
        contrast = self.contrast(batch.pairs, batch.sizes, guide)
        parts = {"loss_contrast": contrast.detach()}
        if not batch.labelled:
            return contrast / 2, parts
        supervised, found = super().loss(batch, guide)
        weight = self.plan.method.segclr.supervised_weight
        return contrast / 2 + weight * supervised, found | parts

    def contrast(self, pairs: Tensor, sizes: tuple[int, ...], guide: Guide | None = None) -> Tensor:
        """Return L_con of pairs (B, 2, C, S, S), the mean over the domains of these sizes.

        A guide has the Gaussian of the other hospitals' projections, the negatives of one domain.
        """
        settings = self.plan.method.segclr
        with autocast_for(self._dtype, self.device):
            projected = project(self.network, pairs)
            predicted = None
            if settings.contrast == "simsiam":
                predicted = head(self.network, "predictor")(projected)
        domains = [torch.split(part.float(), list(sizes)) for part in projected.chunk(2)]
        if isinstance(guide, Guidance):
            negatives = 2 * self.plan.method.batch_size - 2
            first, second = (part.float() for part in projected.chunk(2))
            return global_nt_xent(
                first, second, guide.mean[0], guide.covariance[0], settings.tau, negatives
            )
        if predicted is None:
            pairs_of_domains = zip(*domains, strict=True)
            losses = [nt_xent(one, two, settings.tau) for one, two in pairs_of_domains]
        else:
            own = [part.float().split(list(sizes)) for part in predicted.chunk(2)]
            losses = [simsiam(*four) for four in zip(*own, *domains, strict=True)]
        return torch.stack(losses).mean()


def project(network: nn.Module, pairs: Tensor) -> Tensor:
    """Return the projections (2B, d) of pairs (B, 2, C, S, S), first images first."""
    if not isinstance(network, UNet):
        raise TypeError(f"network: found {type(network).__name__}, expected UNet")
    both = torch.cat([pairs[:, 0], pairs[:, 1]]).contiguous(memory_format=torch.channels_last)
    projected: Tensor = head(network, "projection")(network.encode(both)[-1])
    return projected


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return SimCLR's NT-Xent loss, the mean over both images of all pairs.

    l_i = -log( e^{s(i, p) / tau} / sum over a != i of e^{s(i, a) / tau} )

    s is the cosine similarity, p the other image of i's pair, and a runs over the other 2B - 1
    projections. With B = 1 it is 0.

    Args:
        first: (B, d) projections of the first image of each pair.
        second: (B, d) projections of the second.
        temperature: tau.
    """
    count = len(first)
    unit = F.normalize(torch.cat([first, second]), dim=1)
    logits = unit @ unit.T / temperature
    own = torch.eye(2 * count, dtype=torch.bool, device=unit.device)
    partner = torch.arange(2 * count, device=unit.device).roll(count)
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), partner)


def global_nt_xent(
    first: Tensor,
    second: Tensor,
    mean: Tensor,
    covariance: Tensor,
    temperature: float,
    negatives: int,
) -> Tensor:
    """Return NT-Xent against a Gaussian of negatives, the mean over both images of all pairs.

    l_i = -log( e^{s(i, p) / tau} / (e^{s(i, p) / tau} + M E e^{u_i' z / tau}) ),
    E e^{u' z / tau} = e^{u' mu / tau + u' Sigma u / (2 tau^2)} for z from N(mu, Sigma)

    The sum over M negatives becomes M times its expectation, the closed form of SgCG (eqs. 7-11)
    without classes. As the logarithm is concave, l_i is not below its expectation over M drawn
    negatives. u_i are projections of unit length, for which a Gaussian is an approximation.

    Args:
        first: (B, d) projections of the first image of each pair.
        second: (B, d) projections of the second.
        mean: (d,) mu of the other hospitals' projections of unit length, a constant.
        covariance: (d, d) Sigma, symmetric, a constant.
        temperature: tau.
        negatives: M, the number that a whole batch would have.
    """
    unit = F.normalize(torch.cat([first, second]), dim=1)
    mean, covariance = mean.to(unit.dtype), covariance.to(unit.dtype)
    positive = (unit * unit.roll(len(first), 0)).sum(1) / temperature
    spread = ((unit @ covariance) * unit).sum(1) / (2 * temperature**2)
    other = unit @ mean / temperature + spread + math.log(negatives)
    return (torch.logaddexp(positive, other) - positive).mean()


def simsiam(
    predicted_first: Tensor, predicted_second: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Return SimSiam's loss, -1/2 (cos(p1, sg(z2)) + cos(p2, sg(z1))), the mean over the pairs.

    Args:
        predicted_first: (B, d) p1, the predictor's output for the first images.
        predicted_second: (B, d) p2.
        first: (B, d) z1, projections of the first images; they are constants here (stop-gradient).
        second: (B, d) z2.
    """
    one = F.cosine_similarity(predicted_first, second.detach(), dim=1)
    two = F.cosine_similarity(predicted_second, first.detach(), dim=1)
    return -(one.mean() + two.mean()) / 2
