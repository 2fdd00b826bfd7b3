"""Predicts one image with the preprocessing of training and the decisions of evaluation.

Legend: S structures, K classes, C output channels; Z, Y, X native slices, rows, columns; h, w
training size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from fedsgcg.clients.confidence import Gaussians
from fedsgcg.clients.data.slices import to_slices
from fedsgcg.clients.data.store import SliceTable
from fedsgcg.clients.evaluation import (
    evaluation_mode,
    native_probabilities,
    post_process,
    structures_from_logits,
)
from fedsgcg.clients.predict.model import Model
from fedsgcg.common.errors import fail
from fedsgcg.common.images.read import Volume, check_image, read_volume
from fedsgcg.common.settings.plan import DataSettings

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one image, in canonical orientation (`common.images.read`).

    Attributes:
        volume: The image.
        display: (Z, Y, X) uint8, for display.
        masks: (S, Z, Y, X) structures after post-processing, as scored in evaluation.
        classes: (Z, Y, X) uint8 class indices.
        labels: (Z, Y, X) label values of the training masks; the first one for a class with
            several.
        probability: (S, Z, Y, X) float32 before threshold and post-processing; None if not
            requested.
        confidence: (Z, Y, X) float32 (`clients.predict.confidence`); None if not requested.
    """

    volume: Volume
    display: NDArray[np.uint8]
    masks: Mask
    classes: NDArray[np.uint8]
    labels: NDArray[Any]
    probability: NDArray[np.float32] | None = None
    confidence: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        """Return the shapes; a notebook shows a prediction by this text."""
        names = ("masks", "labels", "probability", "confidence")
        found = {name: getattr(self, name) for name in names}
        shapes = [f"{name} {array.shape}" for name, array in found.items() if array is not None]
        return f"Prediction({', '.join(shapes)})"


@dataclass(frozen=True)
class Predictor:
    """A model on a device, and which maps it returns.

    Attributes:
        model: The model.
        device: Device of the model.
        batch: Slices per forward pass.
        probability: Whether to return probabilities.
        gaussians: The prototypes for a confidence map; None for no map.
    """

    model: Model
    device: torch.device
    batch: int
    probability: bool = False
    gaussians: Gaussians | None = None

    def predict(self, path: Path) -> Prediction:
        """Read and predict one image file.

        Raises:
            FedsgcgError: DAT-103, DAT-106, DAT-107, DAT-108 or DAT-115 for an unusable image,
                MOD-806 for a kind of image that the model was not trained on.
        """
        volume = read_volume(path)
        if volume.kind not in self.model.kinds:
            expected = " or ".join(self.model.kinds)
            action = (
                "Use a model for such images; a volume can also be resampled to slices of the "
                "model's plane."
            )
            raise fail(
                "MOD-806", where=str(path), found=volume.kind, expected=expected, action=action
            )
        check_image(volume, str(path))
        return self.apply(volume)

    def apply(self, volume: Volume) -> Prediction:
        """Predict an image that has been read and checked."""
        data = self.model.data
        native = volume.array.shape[-2:]
        depth = 1 if volume.is_picture else volume.array.shape[0]
        slices = to_slices(volume, np.zeros((depth, *native), np.uint8), data)
        none = np.zeros(depth, np.int64)
        table = SliceTable(none, np.arange(depth), none.astype(np.bool_), data.stack, (slices,))
        logits, squares = self._maps(table)
        masks = post_process(
            structures_from_logits(logits, native, data), data, is_picture=volume.is_picture
        )
        classes = class_map(masks, logits, native, data)
        return Prediction(
            volume=volume,
            display=slices.display,
            masks=masks,
            classes=classes,
            labels=label_values(data)[classes],
            probability=probabilities(logits, native, data) if self.probability else None,
            confidence=self._confidence(squares, classes),
        )

    def _maps(self, table: SliceTable) -> tuple[Tensor, list[Tensor]]:
        """Return logits (Z, C, h, w) and, for confidence, each slice's distances (K, h, w)."""
        network = self.model.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        logits, squares = [], []
        with evaluation_mode(network):
            for start in range(0, len(table), self.batch):
                images, _ = table.stack(np.arange(start, min(start + self.batch, len(table))))
                batch = torch.from_numpy(images).to(self.device, memory_format=torch.channels_last)
                out, features = network(batch)
                logits.append(out.float())
                if self.gaussians is not None:
                    distances = self.gaussians.squared_distance(
                        features, normalize=self.model.normalize
                    )
                    squares += list(torch.unbind(distances.cpu()))
        return torch.cat(logits), squares

    def _confidence(
        self, squares: list[Tensor], classes: NDArray[np.uint8]
    ) -> NDArray[np.float32] | None:
        """Resize the distances to native size and return the confidence in the predicted class."""
        if self.gaussians is None:
            return None
        layers = []
        for square, layer in zip(squares, classes, strict=True):
            wide = F.interpolate(
                square[None], size=layer.shape, mode="bilinear", align_corners=False
            )[0]
            chosen = wide.gather(0, torch.from_numpy(layer.astype(np.int64))[None])[0]
            layers.append(self.gaussians.confidence(chosen).nan_to_num(0.0).numpy())
        return np.stack(layers)


def label_values(data: DataSettings) -> NDArray[Any]:
    """Return the label value (K,) of each class; the first one for a class with several."""
    values = [group[0] for group in data.classes.values()]
    kinds = (kind for kind in (np.uint8, np.int16, np.int32) if _fits(values, kind))
    return np.array(values, next(kinds, np.int64))


def _fits(values: list[int], kind: type[np.integer[Any]]) -> bool:
    return min(values) >= np.iinfo(kind).min and max(values) <= np.iinfo(kind).max


def class_map(
    masks: Mask, logits: Tensor, native: tuple[int, ...], data: DataSettings
) -> NDArray[np.uint8]:
    """Return class indices (Z, Y, X) of structures (S, Z, Y, X), which may be nested.

    Outer structures are drawn first, then their inner ones. A structure is drawn as the class that
    none of its inner structures has; if several remain, as the most likely one (softmax) or the
    first (sigmoid). If structures overlap without being nested, the smaller one is drawn over the
    larger one.

    Args:
        masks: Structures after post-processing.
        logits: (Z, C, h, w), needed for structures of several classes.
        native: (Y, X).
        data: Classes and structures.
    """
    parts = [set(group) for group in data.structure_classes().values()]
    classes = np.zeros(masks.shape[1:], np.uint8)
    for index in sorted(
        range(len(parts)), key=lambda one: (-len(parts[one]), -int(masks[one].sum()))
    ):
        inner = set().union(*(part for part in parts if part < parts[index]))
        own = sorted(parts[index] - inner or parts[index])
        drawn: NDArray[np.uint8] = np.full(1, own[0], np.uint8)
        if len(own) > 1 and data.activation == "softmax":
            drawn = _most_likely(logits, native, own, data)[masks[index]]
        classes[masks[index]] = drawn
    return classes


def probabilities(
    logits: Tensor, native: tuple[int, ...], data: DataSettings
) -> NDArray[np.float32]:
    """Return structure probabilities (S, Z, Y, X) of logits (Z, C, h, w) at native size (Y, X)."""
    groups = list(data.structure_classes().values())
    layers = []
    for maps in native_probabilities(logits, native, data):
        if data.activation == "softmax":
            layers.append(torch.stack([maps[group].sum(0) for group in groups]))
        else:
            layers.append(maps)
    found: NDArray[np.float32] = torch.stack(layers, 1).clamp(0, 1).cpu().numpy()
    return found


def _most_likely(
    logits: Tensor, native: tuple[int, ...], own: list[int], data: DataSettings
) -> NDArray[np.uint8]:
    """Return the most likely of some classes (Z, Y, X)."""
    chosen = [maps[own].argmax(0) for maps in native_probabilities(logits, native, data)]
    found: NDArray[np.uint8] = np.array(own, np.uint8)[torch.stack(chosen).cpu().numpy()]
    return found
