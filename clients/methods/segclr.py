"""SegCLR: supervised and contrastive learning of one network, jointly (arXiv 2405.05336).

    L = 1/2 (L_con(source) + L_con(target)) + lambda L_sup(source),  lambda = 20 (section II-C)

L_con is the contrastive loss of the projections of the encoder's deepest map, L_sup the supervised
loss of this project. In a federation every hospital minimises its own terms: one with labels
1/2 L_con + lambda L_sup, one of role `unlabelled` 1/2 L_con. A client with several domains (pooled
training) uses the mean of L_con over its domains, each with negatives of its own domain only, so
that distinguishing domains does not lower the loss. See docs/explanation/segclr.md.

Legend: B pairs, d length of a projection, C channels, S image side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.device import autocast_for
from fedsgcg.clients.methods.base import Loss, Source
from fedsgcg.clients.methods.guidance import Guide
from fedsgcg.common.heads import head
from fedsgcg.common.networks import UNet


class SegCLR(Source):
    """SegCLR: supervised and contrastive learning jointly, also at hospitals without masks.

    Formula: L = 1/2 (L_con(source) + L_con(target)) + 20 L_supervised, with NT-Xent or SimSiam of
        two views' projections of the deepest map; a term is left out where a batch has no labels or
        no pairs.
    Leaves: weights, those of the projection heads included; of a hospital without masks only the
        encoder and the heads count.
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
        contrast = self.contrast(batch.pairs, batch.sizes)
        parts = {"loss_contrast": contrast.detach()}
        if not batch.labelled:
            return contrast / 2, parts
        supervised, found = super().loss(batch, guide)
        weight = self.plan.method.segclr.supervised_weight
        return contrast / 2 + weight * supervised, found | parts

    def contrast(self, pairs: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Return L_con of pairs (B, 2, C, S, S), the mean over the domains of these sizes."""
        if not isinstance(self.network, UNet):
            raise TypeError(f"network: found {type(self.network).__name__}, expected UNet")
        settings = self.plan.method.segclr
        with autocast_for(self._dtype, self.device):
            both = torch.cat([pairs[:, 0], pairs[:, 1]])
            both = both.contiguous(memory_format=torch.channels_last)
            projected = head(self.network, "projection")(self.network.encode(both)[-1])
            predicted = None
            if settings.contrast == "simsiam":
                predicted = head(self.network, "predictor")(projected)
        domains = [part.float().split(list(sizes)) for part in projected.chunk(2)]
        if predicted is None:
            pairs_of_domains = zip(*domains, strict=True)
            losses = [nt_xent(one, two, settings.tau) for one, two in pairs_of_domains]
        else:
            own = [part.float().split(list(sizes)) for part in predicted.chunk(2)]
            losses = [simsiam(*four) for four in zip(*own, *domains, strict=True)]
        return torch.stack(losses).mean()


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
