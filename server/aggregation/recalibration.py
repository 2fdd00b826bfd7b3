"""CCVR: the output layer fitted anew to features drawn from the Gaussians of the classes.

A federation's output layer leans towards the classes of the hospitals that it last learned from.
The class Gaussians that the sites share describe the features of all of them, so that the
coordinator can fit the layer without an image (Luo et al., No Fear of Heterogeneity, NeurIPS 2021):
virtual features are drawn from N(mu_k, Sigma_k), as many of a class as its share of the pixels, and
the cross-entropy of their class is minimised.

The U-Net's output layer is a convolution of 3 x 3 pixels, and the Gaussians describe single ones.
A virtual feature stands for a neighbourhood of equal features, whose logits are the sum of the
kernel over its positions times the feature. Fitted are a change of the kernel's centre and of the
bias, so that the response to an edge stays. The fit is convex, with a quadratic penalty of the
change.

Legend: K classes, A feature channels, C output channels, M virtual features.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedsgcg.common.seeding import stream
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Weights

KERNEL, BIAS = "decoder.head.weight", "decoder.head.bias"
RIDGE: Final = 1e-3
"""Weight of the squared change of kernel and bias; our choice."""
MOST_STEPS: Final = 200

Array = npt.NDArray[np.float64]


def recalibrated(weights: Weights, statistics: ClassStatistics, plan: Plan) -> Weights:
    """Return a model with a fitted output layer.

    Args:
        weights: The U-Net's weights.
        statistics: Of the model's penultimate features, not normalised, over all sites.
        plan: Number of virtual features, activation, structures and seed.
    """
    rng = stream(plan.seed, "virtual features")
    features, classes = virtual_features(statistics, plan.method.sgcg.recalibration, rng)
    state = {name: np.array(array) for name, array in weights.to_state().items()}
    kernel, bias = state[KERNEL], state[BIAS]
    change, shift = fitted_change(
        kernel.astype(np.float64).sum((2, 3)), bias.astype(np.float64), features, classes, plan
    )
    centre = kernel.shape[-1] // 2
    kernel[:, :, centre, centre] += change.astype(np.float32)
    bias += shift.astype(np.float32)
    return Weights.from_state(state)


def virtual_features(
    statistics: ClassStatistics, number: int, rng: np.random.Generator
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Draw about `number` features (M, A) and their classes (M,), two or more of a seen class."""
    total = statistics.count.sum()
    features, classes = [], []
    for k in np.flatnonzero(statistics.count > 0):
        drawn = max(2, round(number * float(statistics.count[k] / total)))
        values, vectors = np.linalg.eigh(statistics.covariance[k])
        root = vectors * np.sqrt(np.maximum(values, 0.0))  # rounding may leave some below zero
        noise = rng.standard_normal((drawn, statistics.num_features))
        features.append(statistics.mean[k] + noise @ root.T)
        classes.append(np.full(drawn, k))
    return np.concatenate(features), np.concatenate(classes)


def fitted_change(
    kernel: Array, bias: Array, features: Array, classes: npt.NDArray[np.int64], plan: Plan
) -> tuple[Array, Array]:
    """Return the changes of a linear layer (C, A) and its bias (C,) that minimise the entropy.

    The objective is the mean cross-entropy over the features plus RIDGE / 2 times the squared norm
    of the change; it is minimised in float64.
    """
    inputs, start = torch.from_numpy(features), torch.from_numpy(bias)
    weight = torch.from_numpy(kernel)
    truth = _truth(classes, plan)
    change = torch.zeros_like(weight, requires_grad=True)
    shift = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [change, shift],
        max_iter=MOST_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ (weight + change).T + start + shift
        entropy = (
            F.cross_entropy(logits, truth)
            if plan.data.activation == "softmax"
            else F.binary_cross_entropy_with_logits(logits, truth)
        )
        value: Tensor = entropy + RIDGE / 2 * (change.square().sum() + shift.square().sum())
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return change.detach().numpy(), shift.detach().numpy()


def _truth(classes: npt.NDArray[np.int64], plan: Plan) -> Tensor:
    """Return class indices (M,) for a softmax, else whether a class is in a structure (M, C)."""
    if plan.data.activation == "softmax":
        return torch.from_numpy(classes)
    groups = plan.data.structure_classes().values()
    inside = np.stack([np.isin(classes, group) for group in groups], axis=1)
    return torch.from_numpy(inside.astype(np.float64))
