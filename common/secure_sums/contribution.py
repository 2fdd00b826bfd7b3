"""What a secure sum adds up: the change of the weights, class statistics, moments and figures.

Everything is a sum over sites, so that the total determines what a plain merge computes. Numbers
are divided by public powers of two that bound them (slices, pixels), which costs no precision and
lets each block use its whole range (`fixed_point`).

- `figures`: FedAvg weight a, examples, examples times loss, whether there is a loss, validation
  cases times Dice, validation cases, whether the update was shortened;
- `weights`: a (w - w0), with w0 the model that all sites received;
- `counters`: increments of BatchNorm's counters;
- `count`, `first`, `second`: per class n, sum (x - c), upper triangle of sum (x - c)(x - c)^T,
  with c the last global prototypes, the same at all sites;
- `inputs`, `shares`, `input_first`, `input_second`: per BatchNorm layer the number of inputs n and
  its weight b; per channel b (m - m0) and b (v + (m - m0)^2) of their mean m and variance v, with
  m0 the received model's running mean.

Legend: K classes incl. background, A feature channels, P floating-point weights, L BatchNorm
layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from fedsgcg.common.errors import fail
from fedsgcg.common.secure_sums.fixed_point import (
    Array,
    Block,
    Words,
    decode,
    encode,
    power_of_two,
)
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.learnable import learnable
from fedsgcg.common.wire.norm_moments import MEAN, NormMoments, norm_layers
from fedsgcg.common.wire.payload import Weights

FIGURES: Final = ("weight", "examples", "loss", "losses", "dice", "cases", "shortened")
MOST_LOSS: Final = 1000.0
"""Largest loss that is summed; with a larger one there is no mean loss of the round."""
MOST_CASES: Final = 2.0**20
MOST_STEPS: Final = 2.0**30
"""Bounds of the validation cases of a site and of the steps of a round."""
NEGATIVE: Final = 1e-6
"""Most negative eigenvalue of a merged covariance, relative to its trace: rounding."""


@dataclass(frozen=True)
class Contribution:
    """What one site adds, or what the sum of several gives.

    Attributes:
        weights: The trained model; of a sum, the weighted mean of the models.
        statistics: Class statistics, pooled in a sum.
        moments: Moments of the BatchNorm layers' inputs, pooled in a sum.
        metrics: `examples`, `loss`, `validation_dice` and `validation_cases`; of a sum, also
            `shortened_updates`.
    """

    weights: Weights | None = None
    statistics: ClassStatistics | None = None
    moments: NormMoments | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scheme:
    """Which blocks a sum has, and their bounds; the same at the coordinator and all sites.

    Attributes:
        sites: Most sites of the sum.
        examples: Most training slices of a site, a power of two.
        pixels: Most pixels of a class, or inputs of a layer, at a site; a power of two.
        weights: The model that the sites received, if they send theirs.
        equal: Whether each site's weight is one instead of its examples.
        shape: (K, A) of the class statistics; None if none are summed.
        centre: c, the reference of the statistics (K, A); None is the origin.
        feature: Bound of a feature's magnitude.
        measured: Model whose BatchNorm layers' inputs were measured; None if none were.
        activation: Bound of the means and standard deviations of these inputs.
        change: Bound of the change of a weight.
        update_norm: Longest update, 0 = any.
    """

    sites: int
    examples: float
    pixels: float
    weights: Weights | None = None
    equal: bool = False
    shape: tuple[int, int] | None = None
    centre: npt.NDArray[np.float64] | None = None
    feature: float = 1.0
    measured: Weights | None = None
    activation: float = 1024.0
    change: float = 1024.0
    update_norm: float = 0.0

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the sum."""
        found: list[Block] = []
        if self.weights is not None:
            found.append(Block("figures", len(FIGURES), power_of_two(MOST_LOSS)))
            found.append(Block("weights", self.weights.values.size, power_of_two(self.change)))
            found.append(Block("counters", len(self.weights.counters), MOST_STEPS))
        if self.shape is not None:
            classes, features = self.shape
            radius = power_of_two(2.0 * self.feature)  # |x - c| with |x| and |c| up to the bound
            triangle = features * (features + 1) // 2
            found.append(Block("count", classes, 1.0))
            found.append(Block("first", classes * features, radius))
            found.append(Block("second", classes * triangle, radius**2))
        if self.measured is not None:
            layers = norm_layers(self.measured)
            channels, radius = sum(layers.values()), power_of_two(2.0 * self.activation)
            found.append(Block("inputs", len(layers), 1.0))
            found.append(Block("shares", len(layers), 1.0))
            found.append(Block("input_first", channels, radius))
            found.append(Block("input_second", channels, 2.0 * radius**2))
        return tuple(found)

    @property
    def size(self) -> int:
        """Integers of a site."""
        return sum(block.size for block in self.blocks)

    def encode(self, own: Contribution) -> Words:
        """Return a site's contribution as integers.

        Raises:
            FedsgcgError: PRV-957 for a number beyond its bound.
            ValueError: A part of the sum is missing, or does not have its shape.
        """
        numbers: dict[str, Array] = {}
        if self.weights is not None:
            numbers |= self._numbers_of_weights(own)
        if self.shape is not None:
            if own.statistics is None:
                raise ValueError("statistics: found none")
            count, first, second = own.statistics.to_sums(self.centre)
            rows, columns = np.triu_indices(self.shape[1])
            numbers["count"] = count / self.pixels
            numbers["first"] = first / self.pixels
            numbers["second"] = second[:, rows, columns] / self.pixels
        if self.measured is not None:
            if own.moments is None:
                raise ValueError("moments: found none")
            numbers |= self._numbers_of_moments(own.moments)
        return encode(self.blocks, numbers, self.sites)

    def decode(self, total: Words, contributors: int) -> Contribution:
        """Return what a plain merge of the contributors gives.

        Raises:
            FedsgcgError: PRV-960 for a sum that no such sites can have.
        """
        sums = decode(self.blocks, total, self.sites, contributors)
        found = Contribution()
        if self.weights is not None:
            found = self._merged(sums, contributors)
        if self.shape is not None:
            found = replace(found, statistics=self._statistics(sums))
        if self.measured is not None:
            found = replace(found, moments=self._moments(sums))
        return found

    def _numbers_of_weights(self, own: Contribution) -> dict[str, Array]:
        received, trained = self.weights, own.weights
        if received is None or trained is None or trained.layout != received.layout:
            raise ValueError("weights: found none, or another layout")
        change = trained.values.astype(np.float64) - received.values
        shortened = self._shorten(change)
        examples = own.metrics["examples"] / self.examples
        share = 1.0 if self.equal else examples
        loss = own.metrics.get("loss", math.nan)
        known = abs(loss) <= MOST_LOSS
        cases = own.metrics.get("validation_cases", 0.0) / MOST_CASES
        dice = own.metrics.get("validation_dice", 0.0)
        figures = {
            "weight": share,
            "examples": examples,
            "loss": examples * loss if known else 0.0,
            "losses": float(known),
            "dice": dice * cases,
            "cases": cases,
            "shortened": float(shortened),
        }
        if not 0.0 < examples <= 1.0:
            raise fail(
                "PRV-957",
                where="examples",
                found=f"{own.metrics['examples']:g} slices",
                expected=f"1 to {self.examples:g}",
                action="start the run again: the hospital has more slices than it enrolled with",
            )
        before, after = dict(received.counters), dict(trained.counters)
        return {
            "figures": np.array([figures[name] for name in FIGURES]),
            "weights": share * change,
            "counters": np.array([float(after[name] - before[name]) for name in before]),
        }

    def _shorten(self, change: Array) -> bool:
        """Shorten an update in place to the longest one; returns whether it was longer."""
        if not self.update_norm or self.weights is None:
            return False
        mask = learnable(self.weights)
        length = float(np.linalg.norm(change[mask]))
        if not length > self.update_norm:
            return False
        change[mask] *= self.update_norm / length
        return True

    def _merged(self, sums: Mapping[str, Array], contributors: int) -> Contribution:
        received = self.weights
        if received is None:
            raise AssertionError("blocks of weights belong to a model")
        figures = dict(zip(FIGURES, sums["figures"].tolist(), strict=True))
        if not 0.0 < figures["weight"] <= contributors:
            raise fail("PRV-960", found=f"weights of {figures['weight']:g}", expected="above 0")
        values = received.values + sums["weights"] / figures["weight"]
        steps = np.rint(sums["counters"] / contributors).astype(np.int64).tolist()
        counters = tuple(
            (name, value + step)
            for (name, value), step in zip(received.counters, steps, strict=True)
        )
        metrics = {
            "examples": float(np.rint(figures["examples"] * self.examples)),
            "shortened_updates": figures["shortened"],
        }
        if figures["losses"] == contributors and figures["examples"] > 0:
            metrics["loss"] = figures["loss"] / figures["examples"]
        if (cases := float(np.rint(figures["cases"] * MOST_CASES))) > 0:
            metrics["validation_dice"] = figures["dice"] * MOST_CASES / cases
            metrics["validation_cases"] = cases
        weights = Weights(received.layout, values.astype(np.float32), counters)
        return Contribution(weights=weights, metrics=metrics)

    def _statistics(self, sums: Mapping[str, Array]) -> ClassStatistics:
        classes, features = self.shape or (0, 0)
        count = np.rint(sums["count"] * self.pixels)
        if (count < 0).any():
            raise fail("PRV-960", where="statistics", found="a negative number of pixels")
        rows, columns = np.triu_indices(features)
        second = np.zeros((classes, features, features))
        second[:, rows, columns] = sums["second"].reshape(classes, -1) * self.pixels
        second[:, columns, rows] = second[:, rows, columns]
        first = sums["first"].reshape(classes, features) * self.pixels
        found = ClassStatistics.from_sums(count, first, second, self.centre)
        values = np.linalg.eigvalsh(found.scatter)
        trace = np.maximum(np.trace(found.scatter, axis1=1, axis2=2), count)
        if (values[:, 0] < -NEGATIVE * trace).any():
            raise fail("PRV-960", where="statistics", found="a negative variance")
        return found

    def _numbers_of_moments(self, own: NormMoments) -> dict[str, Array]:
        if dict(own.layers) != self._layers:
            raise ValueError(f"moments: found layers {list(own.layers)}")
        sizes = list(own.layers.values())
        inputs = own.count / self.pixels
        shares = (own.count > 0).astype(np.float64) if self.equal else inputs
        variance = own.scatter / np.repeat(np.maximum(own.count, 1.0), sizes)
        offset = own.mean - self._centres
        weight = np.repeat(shares, sizes)
        return {
            "inputs": inputs,
            "shares": shares,
            "input_first": weight * offset,
            "input_second": weight * (variance + np.square(offset)),
        }

    def _moments(self, sums: Mapping[str, Array]) -> NormMoments:
        sizes = list(self._layers.values())
        shares, count = sums["shares"], np.rint(sums["inputs"] * self.pixels)
        if (count < 0).any() or (shares < 0).any():
            raise fail("PRV-960", where="moments", found="a negative number of inputs")
        weight = np.repeat(np.where(shares > 0, shares, 1.0), sizes)
        offset = sums["input_first"] / weight
        variance = np.maximum(sums["input_second"] / weight - np.square(offset), 0.0)
        return NormMoments(
            self._layers, count, self._centres + offset, variance * np.repeat(count, sizes)
        )

    @cached_property
    def _layers(self) -> dict[str, int]:
        return norm_layers(self.measured) if self.measured is not None else {}

    @cached_property
    def _centres(self) -> Array:
        state = self.measured.to_state() if self.measured is not None else {}
        means = [state[layer + MEAN].astype(np.float64) for layer in self._layers]
        return np.concatenate([np.zeros(0), *means])
