"""SAML: shape-aware meta-learning over the client's domains.

A client with several hospitals (`federation=pooled`) has real domains: in each step one of them,
drawn at random, is the meta-test domain and the others are meta-train. (The published code draws
two and one of five.) A client with one hospital has a virtual meta-test domain: its own slices with
amplitudes of other images, or of other sites if they agreed (`method.ram.sharing`).

Legend: B batch, F foreground channels, A feature channels, S structures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods.base import (
    SMOOTH,
    Loss,
    Source,
    View,
    mean_dice_loss,
    segmentation_loss,
    structure_targets,
    targets,
)
from fedsgcg.clients.methods.boundary import triplet_loss
from fedsgcg.clients.methods.elcfs import boundary_embeddings
from fedsgcg.clients.methods.guidance import Guide
from fedsgcg.clients.methods.steps import (
    frozen_moments,
    gradients,
    moved,
    norm_of,
    trained_weights,
)
from fedsgcg.common.seeding import stream_seed
from fedsgcg.common.settings.plan import Plan

LENGTH: Final = 0.01
"""Factor of a contour's length in the compactness, as in the published code."""
METRIC: Final = (24, 16)
"""Channels of the network before the triplet loss; the published one has 48-24-16."""


class Saml(Source):
    """SAML: a virtual step on some domains must segment another one, with plausible shapes.

    Formula: L = Dice(meta-train; w) + Dice(meta-test; w') + compactness + 0.005 smoothness at w' =
        w - r grad Dice(meta-train; w); compactness = mean of (0.01 length)^2 / (4 pi area) of the
        predictions; smoothness = triplet loss of the boundary's features.
    Leaves: weights; the small network before the triplet loss stays at the site. With one hospital
        per client and `method.ram.sharing=summary` or `bank` amplitudes, by the site's consent.
    Defaults: r = 1e-4, norm at most 10, weights 1 and 0.005, margin 10 as published. The gradient
        passes through the virtual step as the objective says (`second_order`); the published code
        stops it. Both Dice terms have one learning rate; the published code has 1e-4 and 1e-3.
        Boundary features are those of the penultimate map alone.
    Source: Liu et al., Shape-aware Meta-learning, MICCAI 2020, eqs. 1-6.
    """

    mixes = True
    captures = False  # the domains of a step, and so its shapes, are drawn
    parts = ("loss_supervised", "loss_meta", "loss_compactness", "loss_smoothness")

    def __init__(self, network: nn.Module, plan: Plan, domains: int, device: torch.device) -> None:
        super().__init__(network, plan, domains, device)
        metric = metric_network(plan.network.num_features, stream_seed(plan.seed, "metric"))
        self.local["metric"] = metric.to(device)

    def groups(self) -> list[dict[str, Any]]:
        """Return the network's and the metric network's parameters."""
        return [{"params": [*self.network.parameters(), *self.local.parameters()], "factor": 1.0}]

    def draw(
        self, sizes: Sequence[int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], ...]:
        """Draw the meta-test domain: 1 for each of its slices, 0 for the others."""
        if len(sizes) == 1:
            return ()
        chosen = int(rng.integers(0, len(sizes)))
        return (np.repeat(np.arange(len(sizes)) == chosen, sizes).astype(np.float32),)

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the loss of an episode.

        `loss_supervised` is cross-entropy plus Dice of the meta-train slices, for comparison. Only
        the pass over them updates BatchNorm's running moments.
        """
        settings, data = self.plan.method.saml, self.plan.data
        (train, train_labels), (test, test_labels) = episode(batch)
        weights = trained_weights(self.network)
        learned = self.view("source", train)
        inner = mean_dice_loss(*targets(learned.logits, train_labels, data))
        gradient = gradients(inner, weights, second_order=settings.second_order)
        step = bounded_descent(gradient, settings.inner_rate, settings.clip)
        if not settings.second_order:
            step = {name: part.detach() for name, part in step.items()}
        with frozen_moments(self.network):
            view = self.view("meta", test, moved(weights, step))
        probability, truth, valid = targets(view.logits, test_labels, data)
        meta = mean_dice_loss(probability, truth, valid)
        compactness = compactness_loss(probability)
        smoothness = self._smoothness([(learned, train_labels), (view, test_labels)])
        shape = settings.compactness * compactness + settings.smoothness * smoothness
        parts = {
            "loss_supervised": segmentation_loss(learned.logits.detach(), train_labels, data),
            "loss_meta": meta.detach(),
            "loss_compactness": compactness.detach(),
            "loss_smoothness": smoothness.detach(),
        }
        return inner + meta + shape, parts

    def _smoothness(self, views: Sequence[tuple[View, Tensor]]) -> Tensor:
        """Return the mean over the structures of the triplet loss over the episode's slices."""
        settings, structures = self.plan.method.saml, self.plan.data.structure_classes()
        found = [
            boundary_embeddings(
                [view.features], structure_targets(labels, structures), settings.ring
            )
            for view, labels in views
        ]
        embeddings, inside, valid = (torch.cat(part) for part in zip(*found, strict=True))
        metric = self.local["metric"](embeddings)
        losses = [
            triplet_loss(metric[:, s], inside, valid[:, s], settings.margin)
            for s in range(metric.shape[1])
        ]
        return torch.stack(losses).mean()


Slices = tuple[Tensor, Tensor]


def episode(batch: Batch) -> tuple[Slices, Slices]:
    """Return the images and labels of the meta-train and of the meta-test slices."""
    if batch.drawn:
        test = batch.drawn[0] > 0
        return (batch.images[~test], batch.labels[~test]), (batch.images[test], batch.labels[test])
    if batch.mixed is None:
        raise ValueError("batch.mixed: found None, expected the amplitude-mixed copies")
    return (batch.images, batch.labels), (batch.mixed, batch.labels)


def bounded_descent(gradient: Mapping[str, Tensor], rate: float, clip: float) -> dict[str, Tensor]:
    """Return -rate times a gradient whose norm is scaled down to `clip` if it is larger."""
    factor = (clip / norm_of(gradient)).clamp(max=1.0)
    return {name: -rate * factor * part for name, part in gradient.items()}


def compactness_loss(probability: Tensor) -> Tensor:
    """Return the mean over slices and channels of (0.01 P)^2 / (4 pi A), at least 0.

    P is the sum over the pixels of the length of the probability's gradient, A the sum of the
    probability; the shape is a disk when P^2 / (4 pi A) is smallest.

    Args:
        probability: (B, F, H, W).
    """
    rows = probability[:, :, 1:, :-1] - probability[:, :, :-1, :-1]
    columns = probability[:, :, :-1, 1:] - probability[:, :, :-1, :-1]
    length = LENGTH * (rows.square() + columns.square() + 1e-8).sqrt().sum((2, 3))
    area = probability.sum((2, 3)) + SMOOTH
    return (length.square() / (4 * math.pi * area)).mean()


def metric_network(channels: int, seed: int) -> nn.Sequential:
    """Return the network before the triplet loss, A-24-16; its weights depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(channels, METRIC[0]), nn.LeakyReLU(), nn.Linear(METRIC[0], METRIC[1])
        )
