"""Losses at other weights than the network's own: virtual steps and copies that are not trained.

A virtual step `w + d` with a constant d is a function of w, so that the gradient of a loss at the
moved weights is also the gradient that the optimiser applies to w.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsgcg.common.networks import UNet

EPSILON = 1e-12


def trained_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name that receive gradient."""
    named = network.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def gradients(
    loss: Tensor, weights: Mapping[str, Tensor], *, keep: bool = True, second_order: bool = False
) -> dict[str, Tensor]:
    """Return the gradient of a loss by name; zero where the loss does not depend on a weight.

    Args:
        loss: Scalar.
        weights: The weights.
        keep: Keep the graph, because the loss itself is used again.
        second_order: Make the gradient a function of the weights.
    """
    found = torch.autograd.grad(
        loss,
        list(weights.values()),
        retain_graph=keep,
        create_graph=second_order,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(weights, found, strict=True))


def norm_of(gradient: Mapping[str, Tensor]) -> Tensor:
    """Return the Euclidean norm over all weights."""
    squares = [part.square().sum() for part in gradient.values()]
    return (torch.stack(squares).sum() + EPSILON**2).sqrt()


def moved(weights: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights + step by name."""
    return {name: weight + step[name] for name, weight in weights.items()}


@contextmanager
def frozen_moments(network: nn.Module) -> Iterator[None]:
    """Normalise by the batch as in training, but leave BatchNorm's running moments unchanged."""
    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def constant_copy(network: nn.Module) -> nn.Module:
    """Return a copy that is not trained and always normalises by the batch, as in training."""
    other = copy.deepcopy(network).requires_grad_(False).train()
    for layer in other.modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = False
    return other


def with_code(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a network on images (B, C, H, W).

    Returns:
        Logits, feature map, and the code (B, A): the mean over space of the deepest map, 16w
        channels, or of the feature map if the network is no U-Net.
    """
    if isinstance(network, UNet):
        maps = network.encode(images)
        logits, features = network.decode(maps)
        return logits, features, _pooled(maps[-1])
    logits, features = network(images)
    return logits, features, _pooled(features)


def code_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return only the code of `with_code`, without decoding."""
    if isinstance(network, UNet):
        return _pooled(network.encode(images)[-1])
    return _pooled(network(images)[1])


def _pooled(maps: Tensor) -> Tensor:
    return maps.float().mean((2, 3))
