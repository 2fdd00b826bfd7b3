"""Adapts a model to an unseen hospital's own images, without their masks.

`batchnorm` interpolates BatchNorm's moments, (1 - share) source + share hospital, for mean and
variance (Schneider et al., NeurIPS 2020, with a share in place of a number of pseudo-samples).
While a batch is measured, each layer already normalises by the interpolation with that batch's own
moments, so that deeper layers are measured behind adapted ones. Batches mix the hospital's cases.

`prototypes` moves each class mean towards that of the hospital's confident pixels, and lets the
moved prototypes decide together with the network where it is uncertain. A pixel is confident if the
probability of its class is at least `probability` and its squared Mahalanobis distance per channel
at most `distance`. An uncertain pixel within `distance` of some class has the probabilities

    p'_k proportional to p_k^(1 - share) r_k^share,    r = softmax_k(-d_k^2 / (2 A))

with the distances d_k to the moved prototypes. All other pixels stay as they are.

`amplitude` is HarmoFL's normalisation: the low-frequency amplitudes of each image become the mean
ones of the training hospitals.

Legend: B slices of a batch, C output channels, K classes, S side, A feature channels, h, w size of
the feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsgcg.clients.confidence import Gaussians
from fedsgcg.clients.evaluation import activated, evaluation_mode
from fedsgcg.clients.methods.guidance import pixel_features
from fedsgcg.clients.methods.partners import MeanMixer
from fedsgcg.common.errors import fail
from fedsgcg.common.seeding import stream
from fedsgcg.common.settings.adaptation import AMPLITUDE, BATCHNORM, AdaptSettings
from fedsgcg.common.settings.data import DataSettings
from fedsgcg.common.statistics import ClassStatistics

if TYPE_CHECKING:
    from fedsgcg.clients.data.store import SliceTable

BATCH: Final = 16
MOST_SLICES: Final = 4096
"""Slices of a hospital that are measured, evenly spaced over its images; more change little."""
LEAST: Final = 1e-7
"""Smallest probability, so that a logarithm is finite."""

Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Reference:
    """What the coordinator or the model's folder provides for an adaptation.

    Attributes:
        prototypes: Class statistics of the training hospitals under the model.
        normalize: Whether they are of features of unit length.
        mixer: Gives images the mean amplitudes of the training hospitals.
    """

    prototypes: ClassStatistics | None = None
    normalize: bool = True
    mixer: MeanMixer | None = None


@contextmanager
def adapted(
    network: nn.Module,
    way: str,
    batches: Batches,
    settings: AdaptSettings,
    data: DataSettings,
    reference: Reference,
    device: torch.device,
) -> Iterator[nn.Module]:
    """Yield a network that is adapted to some images; the given one is restored afterwards.

    Args:
        network: The model on the device.
        way: One of `common.settings.adaptation.WAYS`.
        batches: Returns the hospital's images (B, 3, S, S) on the CPU, without labels.
        settings: Shares and gates.
        data: Activation and structures.
        reference: Prototypes or amplitudes.
        device: Device of the network.

    Raises:
        FedsgcgError: TRN-330 for a model that cannot be adapted in this way.
    """
    if way == BATCHNORM:
        with interpolated_moments(network, batches(), settings.share, device):
            yield network
    elif way == AMPLITUDE:
        if reference.mixer is None:
            raise _unusable("no mean amplitudes", "method=harmofl method.ram.sharing=summary")
        yield Normalised(network, reference.mixer)
    else:
        if reference.prototypes is None:
            raise _unusable("no prototypes", "a method with class statistics")
        gaussians = Gaussians.of(reference.prototypes, device)
        refined = Refined(network, gaussians, settings, data, normalize=reference.normalize)
        refined.measure(images.to(device) for images in batches())
        yield refined


def hospital_batches(table: SliceTable) -> Iterator[Tensor]:
    """Yield a hospital's slices in batches that mix its cases, the same whenever it is called."""
    number = min(len(table), MOST_SLICES)
    chosen = np.linspace(0, len(table) - 1, number).round().astype(np.int64)
    order = stream(0, "adaptation").permutation(chosen)
    for start in range(0, number, BATCH):
        yield torch.from_numpy(table.stack(order[start : start + BATCH])[0])


@contextmanager
def interpolated_moments(
    network: nn.Module, batches: Iterable[Tensor], share: float, device: torch.device
) -> Iterator[None]:
    """Replace the running moments of BatchNorm by interpolated ones, and restore them afterwards.

    Raises:
        FedsgcgError: TRN-330 for a network without BatchNorm.
    """
    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    if not layers:
        raise _unusable("a network without BatchNorm layers", "network.norm=batch")
    measured = [_Moments(layer, share) for layer in layers]
    try:
        with evaluation_mode(network):
            for images in batches:
                network(images.to(device, memory_format=torch.channels_last))
        for one in measured:
            one.finish()
        yield
    finally:
        for one in measured:
            one.restore()


class _Moments:
    """The moments of one layer's inputs; batches are pooled in float64."""

    def __init__(self, layer: _BatchNorm, share: float) -> None:
        if layer.running_mean is None or layer.running_var is None:
            raise TypeError("a layer that tracks moments has them")
        self._mean, self._variance = layer.running_mean, layer.running_var
        self._share = share
        self._kept = self._mean.clone(), self._variance.clone()
        self._count = 0
        self._total = torch.zeros_like(self._mean, dtype=torch.float64)
        self._scatter = torch.zeros_like(self._total)
        self._handle = layer.register_forward_pre_hook(self._measure)

    def _measure(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().double().transpose(0, 1).flatten(1)
        n, mean = values.shape[1], values.mean(1)
        scatter = (values - mean[:, None]).square().sum(1)
        delta, count = mean - self._total, self._count + n
        self._scatter += scatter + delta.square() * (self._count * n / count)
        self._total += delta * (n / count)
        self._count = count
        self._put(mean, scatter / max(n - 1, 1))

    def _put(self, mean: Tensor, variance: Tensor) -> None:
        for own, source, found in zip(
            (self._mean, self._variance), self._kept, (mean, variance), strict=True
        ):
            own.copy_(source + self._share * (found.to(source.dtype) - source))

    def finish(self) -> None:
        """Use the moments of all batches; without one, those of the source."""
        self._handle.remove()
        if self._count:
            self._put(self._total, self._scatter / max(self._count - 1, 1))

    def restore(self) -> None:
        """Use the moments of the source again."""
        self._handle.remove()
        for own, source in zip((self._mean, self._variance), self._kept, strict=True):
            own.copy_(source)


class Normalised(nn.Module):
    """A network whose images first get mean amplitudes.

    Args:
        network: The network.
        mixer: Gives images the amplitudes.
    """

    def __init__(self, network: nn.Module, mixer: MeanMixer) -> None:
        super().__init__()
        self.network, self._mixer = network, mixer

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and feature map of the normalised images (B, 3, S, S)."""
        mean, ratio = (part.to(images.device) for part in self._mixer.draw((len(images),)))
        changed = self._mixer.mix(images, mean, ratio).contiguous(memory_format=torch.channels_last)
        found: tuple[Tensor, Tensor] = self.network(changed)
        return found


class Refined(nn.Module):
    """A network whose uncertain pixels are classified with the help of moved prototypes.

    Args:
        network: The network.
        gaussians: Class Gaussians of the training hospitals under the network.
        settings: Shares and gates.
        data: Activation and structures.
        normalize: Whether the Gaussians are of features of unit length.
    """

    def __init__(
        self,
        network: nn.Module,
        gaussians: Gaussians,
        settings: AdaptSettings,
        data: DataSettings,
        *,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.network = network
        self._gaussians, self._settings, self._data = gaussians, settings, data
        self._normalize = normalize

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Move the prototypes towards the confident pixels of images (B, 3, S, S)."""
        start = self._gaussians.mean
        K, A = start.shape
        sums = torch.zeros(K, A, dtype=torch.float64, device=start.device)
        counts = torch.zeros(K, dtype=torch.float64, device=start.device)
        with evaluation_mode(self.network):
            for images in batches:
                batch = images.contiguous(memory_format=torch.channels_last)
                logits, features = self.network(batch)
                classes, confident = self._confident(logits.float(), features)
                pixels = pixel_features(features, self._normalize)[confident].double()
                sums.index_add_(0, classes[confident], pixels)
                counts.index_add_(0, classes[confident], torch.ones_like(pixels[:, 0]))
        own = (sums / counts.clamp(min=1)[:, None]).to(start.dtype)
        seen = counts[:, None] > 0
        moved = torch.where(seen, start + self._settings.share * (own - start), start)
        self._gaussians = replace(self._gaussians, mean=moved)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return refined logits and the feature map of images (B, 3, S, S)."""
        logits, features = self.network(images)
        return self.refined(logits.float(), features), features

    def refined(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return the logits (B, C, S, S) after the refinement of uncertain pixels."""
        A = features.shape[1]
        distance = self._distances(features) / A
        if distance.shape[2:] != logits.shape[2:]:
            finite = distance.clamp(max=1e6)  # infinite for a class without training pixels
            distance = F.interpolate(
                finite, size=logits.shape[2:], mode="bilinear", align_corners=False
            )
        network = class_probabilities(logits, self._data)
        uncertain = network.amax(1, keepdim=True) < self._settings.probability
        near = distance.amin(1, keepdim=True) <= self._settings.distance
        share = self._settings.share
        by_prototypes = (-distance / 2).softmax(1).clamp(min=LEAST).log()
        joint = (1 - share) * network.clamp(min=LEAST).log() + share * by_prototypes
        changed = logits_of_classes(joint.softmax(1), self._data)
        return torch.where(uncertain & near, changed, logits)

    def _confident(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted classes (N,) and whether they are confident, at the map's size."""
        probability = class_probabilities(logits, self._data)
        height, width = features.shape[2:]
        if probability.shape[2:] != features.shape[2:]:
            probability = F.adaptive_avg_pool2d(probability, (height, width))
        highest, classes = probability.max(1)
        distance = self._distances(features).gather(1, classes[:, None])[:, 0] / features.shape[1]
        confident = (highest >= self._settings.probability) & (distance <= self._settings.distance)
        return classes.flatten(), confident.flatten()

    def _distances(self, features: Tensor) -> Tensor:
        return self._gaussians.squared_distance(features, normalize=self._normalize)


def class_probabilities(logits: Tensor, data: DataSettings) -> Tensor:
    """Return the probabilities (B, K, H, W) of the classes, with sum 1.

    With sigmoid outputs a class is the combination of the structures that contain it, and the
    probabilities of impossible combinations are left out.
    """
    probability = activated(logits, data)
    if data.activation == "softmax":
        return probability
    inside = _members(data, logits.device)[None, :, :, None, None]  # (1, K, C, 1, 1)
    logs = torch.where(inside, F.logsigmoid(logits)[:, None], F.logsigmoid(-logits)[:, None]).sum(2)
    return logs.softmax(1)


def logits_of_classes(probability: Tensor, data: DataSettings) -> Tensor:
    """Return logits (B, C, H, W) whose probabilities are those of the classes (B, K, H, W)."""
    if data.activation == "softmax":
        return probability.clamp(min=LEAST).log()
    inside = _members(data, probability.device).to(probability.dtype)
    return torch.einsum("bkhw,kc->bchw", probability, inside).clamp(LEAST, 1 - LEAST).logit()


def _members(data: DataSettings, device: torch.device) -> Tensor:
    """Return (K, C) bool, whether a class belongs to a structure."""
    found = torch.zeros(data.num_classes, len(data.structures), dtype=torch.bool)
    for column, classes in enumerate(data.structure_classes().values()):
        found[list(classes), column] = True
    return found.to(device)


def _unusable(found: str, expected: str) -> Exception:
    action = "leave it out of adapt.by, or train with what it needs"
    return fail("TRN-330", found=found, expected=expected, action=action)
