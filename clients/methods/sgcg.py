"""SgCG: adds the weighted contrastive loss against the global prototypes to a method's loss.

total = L_method + lambda * sum over views of mean_i L_i, with the closed form L_i of SgCG eq. 11,
averaged over the pixels i of a view (eqs. 12-13). See "The closed form" in
docs/explanation/sgcg.md.

Legend: K classes, A feature channels, N pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.data.gin import Numbers, draw_numbers, gin_views
from fedsgcg.clients.device import autocast_for
from fedsgcg.clients.methods.anchors import hard_pixels, weighted_mean
from fedsgcg.clients.methods.base import Loss, Source, View, segmentation_loss
from fedsgcg.clients.methods.guidance import (
    IGNORE,
    Guidance,
    Guide,
    flat_pixels,
    pixel_features,
)
from fedsgcg.clients.methods.steps import frozen_moments
from fedsgcg.common.networks import UNet
from fedsgcg.common.settings.plan import Plan, PrototypeSettings
from fedsgcg.common.sgcg.loss import reduce_labels, sgcg_loss
from fedsgcg.common.sgcg.mixture import mixture_losses


class SgCG(Source):
    """SgCG: the supervised baseline plus the contrastive term with the global prototypes.

    Formula: L = L_supervised + lambda * mean over pixels of logsumexp_k (q' mu_k / tau + q' Sigma_k
        q / (2 tau^2)) - q' mu_y / tau.
    Leaves: weights; count, mean and covariance of every class. With method.sgcg.sites every other
        hospital receives them as those of one hospital, by the site's consent.
    Defaults: tau and lambda chosen on source validation.
    Source: SgCG, eqs. 4-11; docs/explanation/sgcg.md.
    """

    contrasts = True

    def __init__(self, network: nn.Module, plan: Plan, domains: int, device: torch.device) -> None:
        super().__init__(network, plan, domains, device)
        if plan.method.sgcg.between > 0:
            self.parts = (*self.parts, "loss_between")

    def draw(
        self, sizes: Sequence[int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], ...]:
        """Draw the random networks of the view `style` (`clients.data.gin.Numbers`)."""
        if "style" not in self.plan.prototypes.views:
            return ()
        strength = self.plan.method.gin.strength
        return draw_numbers(sum(sizes), self.plan.data.in_channels, strength, rng)

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the supervised loss plus `prototypes.weight` times the contrastive loss.

        Without prototypes it is the supervised loss alone.
        """
        views = self.forward(batch)
        total, parts = self.supervised(batch, views)
        # Called even if the term is off, because a guide may be updated with every batch.
        guidance = guide.after(views[0].features, batch.labels) if guide is not None else None
        if guidance is None:
            return total, parts
        if self.plan.prototypes.weight > 0:
            views = [*views, *self._styled(batch)]
            contrast = contrast_of_views(views, batch.labels, guidance, self.plan)
            total = total + self.plan.prototypes.weight * contrast
            parts = parts | {"loss_contrast": contrast.detach()}
        if self.plan.method.sgcg.between > 0 and guidance.between is not None:
            penalty = between_penalty(views[0].features, batch.labels, guidance, self.plan)
            total = total + self.plan.method.sgcg.between * penalty
            parts = parts | {"loss_between": penalty.detach()}
        return total, parts

    def _styled(self, batch: Batch) -> list[View]:
        """Run the network on a copy of each slice through a random network, if it is a view.

        It does not change BatchNorm's running moments, which remain those of unchanged slices.
        """
        if "style" not in self.plan.prototypes.views:
            return []
        with torch.no_grad():
            images, _ = gin_views(batch.images, Numbers(*batch.drawn), blend=False)
        with frozen_moments(self.network):
            return [self.view("style", images.contiguous(memory_format=torch.channels_last))]

    def diagnose(self, batch: Batch, guide: Guide | None) -> dict[str, float]:
        """Return the cosine of the gradients of both terms with respect to the feature map.

        Near 1 the contrastive term only weights the supervised one differently. The map is the one
        that both terms depend on: with `network.features=projection` the penultimate one. The
        network does not change.
        """
        with frozen_moments(self.network), autocast_for(self._dtype, self.device):
            logits, common, features = self._maps(batch.images)
        guidance = guide.after(features, batch.labels) if guide is not None else None
        if guidance is None:
            return {}
        view = View("source", logits.float(), features)
        terms = (
            segmentation_loss(view.logits, batch.labels, self.plan.data),
            contrast_of_view(view, batch.labels, guidance, self.plan),
        )
        first, second = (
            torch.autograd.grad(term, common, retain_graph=True)[0].double().flatten()
            for term in terms
        )
        norms = first.norm() * second.norm()
        if not float(norms) > 0:
            return {}
        return {"gradient_cosine": float(first @ second / norms)}

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, the last map that they share with the features, and the features."""
        network = self.network
        if isinstance(network, UNet) and network.features == "projection":
            logits, common = network.decoder(network.encode(images))
            return logits, common, network.projection(common)
        logits, features = network(images)
        return logits, features, features


def contrast_of_views(
    views: Sequence[View], labels: Tensor, guidance: Guidance, plan: Plan
) -> Tensor:
    """Return the sum of the contrastive loss over the views of `prototypes.views`.

    Statistics are always those of the source view.
    """
    chosen = [view for view in views if view.name in plan.prototypes.views]
    losses = [contrast_of_view(view, labels, guidance, plan) for view in chosen]
    return torch.stack(losses).sum()


def contrast_of_view(view: View, labels: Tensor, guidance: Guidance, plan: Plan) -> Tensor:
    """Return the contrastive loss of one view, by the variants of `method.sgcg`."""
    settings, variants = plan.prototypes, plan.method.sgcg
    K, width = plan.data.num_classes, view.features.shape[-1]
    if not (variants.hard or variants.sites):
        return contrast_loss(view.features, labels, guidance, settings, K)
    reduced = labels_at(labels, width, K).reshape(-1)
    hard = torch.zeros_like(reduced, dtype=torch.bool)
    if variants.hard:
        hard = hard_pixels(view.logits.detach(), labels, width, plan.data)
    values = pixel_losses(view.features, reduced, guidance, settings, sites=variants.sites)
    balanced = settings.balance == "class"
    return weighted_mean(values, reduced, guidance.active, hard, variants.hard, by_class=balanced)


def pixel_losses(
    penultimate: Tensor,
    labels: Tensor,
    guidance: Guidance,
    settings: PrototypeSettings,
    *,
    sites: bool = False,
) -> Tensor:
    """Return the contrastive loss of every pixel (N,), zero where it is dropped.

    Args:
        penultimate: (B, A, h, w) feature map.
        labels: (N,) class indices at its resolution.
        guidance: The prototypes.
        settings: Temperature, normalisation, form of the covariance.
        sites: Compare with the mixture over the sites, if the coordinator sent their Gaussians.
    """
    pixels = flat_pixels(penultimate)
    if sites and guidance.sites is not None:
        return mixture_losses(
            pixels,
            labels,
            guidance.sites.weight,
            guidance.sites.mean,
            guidance.sites.covariance,
            temperature=settings.temperature,
            active=guidance.active,
            ignore_index=IGNORE,
            covariance_form=settings.covariance,
            unit_norm=settings.normalize,
        )
    return sgcg_loss(
        pixels,
        labels,
        guidance.mean,
        guidance.covariance,
        temperature=settings.temperature,
        active=guidance.active,
        ignore_index=IGNORE,
        reduction="none",
        covariance_form=settings.covariance,
        unit_norm=settings.normalize,
    )


def between_penalty(penultimate: Tensor, labels: Tensor, guidance: Guidance, plan: Plan) -> Tensor:
    """Return the mean of q' B_y q over the pixels of active classes; 0 without one.

    B_y is the covariance of the sites' means of the pixel's class: the term shrinks features in the
    directions in which hospitals differ.
    """
    if guidance.between is None:
        raise ValueError("guidance.between: found None, expected the covariances between sites")
    reduced = labels_at(labels, penultimate.shape[-1], plan.data.num_classes).reshape(-1)
    pixels = pixel_features(penultimate, plan.unit_features)
    known = reduced != IGNORE
    classes = reduced.where(known, 0)
    terms = torch.stack([((pixels @ matrix) * pixels).sum(1) for matrix in guidance.between])
    kept = known & guidance.active[classes]
    values = terms.gather(0, classes[None])[0] * kept
    return values.sum() / kept.sum().clamp(min=1)


def contrast_loss(
    penultimate: Tensor,
    labels: Tensor,
    guidance: Guidance,
    settings: PrototypeSettings,
    num_classes: int,
) -> Tensor:
    """Return the contrastive loss: the mean over pixels, or the mean of per-class means."""
    labels = labels_at(labels, penultimate.shape[-1], num_classes).reshape(-1)
    balanced = settings.balance == "class"
    value = sgcg_loss(
        flat_pixels(penultimate),  # not normalised here; the GPU kernel does it on the fly
        labels,
        guidance.mean,
        guidance.covariance,
        temperature=settings.temperature,
        active=guidance.active,
        ignore_index=IGNORE,
        reduction="none" if balanced else "mean",
        covariance_form=settings.covariance,
        unit_norm=settings.normalize,
    )
    return class_balanced_mean(value, labels, guidance.active) if balanced else value


def class_balanced_mean(values: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    """Return the mean over classes of the per-class means of `values` (N,).

    Only active classes that occur count; without any the result is 0.

    Sums are float64, because `index_add` adds sequentially: float32 loses 0.4 % of a sum of a
    million pixels.
    """
    num_classes = active.shape[0]
    labels = labels.long()
    known = labels < num_classes
    index = labels.where(known, 0)
    weight = (known & active[index]).double()
    totals = torch.zeros(num_classes, dtype=torch.float64, device=values.device).index_add(
        0, index, values * weight
    )
    counts = torch.zeros_like(totals).index_add(0, index, weight)
    return ((totals / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)).to(values.dtype)


def labels_at(labels: Tensor, width: int, num_classes: int) -> Tensor:
    """Return the labels (B, H, W) at the resolution of a feature map of this width."""
    factor = labels.shape[-1] // width
    return (
        labels.long()
        if factor == 1
        else reduce_labels(labels.long(), factor, num_classes, ignore_index=IGNORE)
    )
