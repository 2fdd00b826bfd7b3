"""Evaluates a model on a hospital's cases: every slice is predicted; labels only score.

Evaluation uses BatchNorm's running moments, so a prediction does not depend on the other slices of
its batch. Metrics are computed at the native size of the image, in three dimensions for a volume
and in two for a picture. See "Scoring" in docs/explanation/protocol.md.

Legend: C output channels, S structures, Z, Y, X native slices, rows, columns; B batch, H, W
training size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from scipy import ndimage
from torch import Tensor, nn

from fedsgcg.clients.data.frame import frame_of
from fedsgcg.clients.methods.base import structure_targets
from fedsgcg.clients.methods.guidance import IGNORE
from fedsgcg.common.metrics import segmentation_metrics
from fedsgcg.common.pictures import Picture, choose_picture, write_pictures
from fedsgcg.common.settings.plan import DataSettings, Plan
from fedsgcg.common.wire.payload import DISTANCES, SUMMARISED

if TYPE_CHECKING:
    from fedsgcg.clients.data.store import Case, CaseStore, SliceTable

Mask = npt.NDArray[np.bool_]
BATCH = 16  # slices per forward pass; the result does not depend on it
CONSTANT = 0.95
"""Agreement of a prediction that counts as constant (`MaskAgreement`).

The true masks of PROMISE12's hospitals agree to 0.38 to 0.47, and the largest slices of their
patients to 0.55 to 0.68 (measured at 128 pixels).
"""
DECIMALS = 3
"""Decimals of a summary."""
FEWEST_FOR_SD = 3
"""Fewest cases of which a standard deviation is stated: that of two gives both values exactly."""


class MaskAgreement:
    """How much the predictions of different slices agree, pixel by pixel at training size.

    A model whose prediction does not depend on the image turns a Dice into a volume: of an image
    that is predicted as foreground everywhere, Dice is 2 V / (V + number of pixels).
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._slices = 0

    def add(self, decided: Tensor) -> None:
        """Add structures (B, S, H, W) bool of some slices."""
        counts = decided.sum(0, dtype=torch.int64)
        self._counts = counts if self._counts is None else self._counts + counts
        self._slices += len(decided)

    @property
    def values(self) -> list[float]:
        """For each structure the probability that a pixel predicted in one slice is in another.

        It is 1 for a constant prediction, and 0 if nothing is predicted or there is one slice.
        """
        if self._counts is None or self._slices < 2:
            return [0.0]
        counts = self._counts.double()
        pixels = counts.sum((1, 2))
        pairs = (counts * (counts - 1)).sum((1, 2))
        found: list[float] = (pairs / (pixels * (self._slices - 1)).clamp(min=1)).tolist()
        return found

    @property
    def is_constant(self) -> bool:
        """Whether the prediction of a structure hardly depends on the image."""
        return max(self.values) >= CONSTANT


@dataclass(frozen=True)
class CaseResult:
    """Predicted and true masks of one case at native size.

    Attributes:
        case: The case.
        prediction: (S, Z, Y, X) after post-processing.
        truth: (S, Z, Y, X).
        classes: (Z, Y, X) uint8 true class indices.
    """

    case: Case
    prediction: Mask
    truth: Mask
    classes: npt.NDArray[np.uint8]


def evaluate_cases(
    network: nn.Module,
    stores: Sequence[CaseStore],
    plan: Plan,
    split: str,
    device: torch.device,
    *,
    pictures: Path | None = None,
    agreement: MaskAgreement | None = None,
) -> list[dict[str, Any]]:
    """Predict and score every case of a split.

    Args:
        network: The model to evaluate.
        stores: The cases of each hospital that the site owns.
        plan: Structures, decision rule, post-processing and unit of distances.
        split: `test` or `validation`.
        device: Where the network runs.
        pictures: File for one slice of each case, for people to look at; it stays at the site. None
            writes none.
        agreement: Receives the predictions.

    Returns:
        Rows of `payload.CASES_SCHEMA`, one per case and structure, with cases under their aliases.
    """
    rows: list[dict[str, Any]] = []
    kept: list[Picture] = []
    for store in stores:
        for result in predict_cases(network, store, plan.data, split, device, agreement):
            scored = case_rows(result, plan.data)
            rows += scored
            if pictures is not None:
                kept.append(_picture(result, scored, store))
    if pictures is not None:
        write_pictures(pictures, kept, list(plan.data.structures))
    return rows


def summarise_cases(
    rows: Sequence[Mapping[str, Any]], floor: int
) -> list[dict[str, str | float | None]]:
    """Return what a site states of its cases without consent to per-case results.

    Args:
        rows: Rows of `payload.CASES_SCHEMA`.
        floor: Fewest cases that a number covers.

    Returns:
        One dictionary per structure and metric: structure, metric, mean, sd and count, rounded to
        `DECIMALS`. `sd` is None for fewer than `FEWEST_FOR_SD` cases. `count`, the number of cases
        with a value, is None where fewer cases than the floor have none. A metric with fewer values
        than the floor is left out.
    """
    summary: list[dict[str, str | float | None]] = []
    for structure in dict.fromkeys(str(row["structure"]) for row in rows):
        mine = [row for row in rows if row["structure"] == structure]
        for metric in SUMMARISED:
            stated = [float(row[metric]) for row in mine if row[metric] is not None]
            values = np.array([value for value in stated if np.isfinite(value)])
            if len(values) < max(1, floor):
                continue
            left_out = len(mine) - len(values)
            several = len(values) >= FEWEST_FOR_SD
            summary.append(
                {
                    "structure": structure,
                    "metric": metric,
                    "mean": round(float(values.mean()), DECIMALS),
                    "sd": round(float(values.std(ddof=1)), DECIMALS) if several else None,
                    "count": None if 0 < left_out < floor else len(values),
                }
            )
    return summary


def predict_cases(
    network: nn.Module,
    store: CaseStore,
    data: DataSettings,
    split: str,
    device: torch.device,
    agreement: MaskAgreement | None = None,
) -> Iterator[CaseResult]:
    """Yield the masks of each case; every slice of the cache is read once."""
    table = store.slices(split)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with evaluation_mode(network):
        for index, indices in slices_by_case(table):
            case = store.cases[index]
            logits = torch.cat(
                [logits_of(network, table, part, device) for part in _parts(indices, BATCH)]
            )
            if agreement is not None:
                agreement.add(decide(activated(logits, data), data))
            classes = store.truth(case)
            decided = structures_from_logits(logits, classes.shape[1:], data, case.spacing)
            prediction = post_process(decided, data, is_picture=case.is_picture)
            yield CaseResult(case, prediction, structure_masks(classes, data), classes)


def validation_dice(
    network: nn.Module,
    stores: Sequence[CaseStore],
    plan: Plan,
    device: torch.device,
    agreement: MaskAgreement | None = None,
) -> tuple[float, int]:
    """Compute the Dice of the validation cases at training size, for curves and model selection.

    The predictions are added to `agreement` if it is given.

    Returns:
        The Dice averaged over structures, then over the validation cases of all hospitals, and the
        number of cases; NaN and 0 without a validation case.
    """
    tables = [table for store in stores if len(table := store.slices("validation"))]
    found = [_validation_dice(network, table, plan, device, agreement) for table in tables]
    number = sum(cases for _, cases in found)
    return sum(dice * cases for dice, cases in found) / number if number else float("nan"), number


def _validation_dice(
    network: nn.Module,
    table: SliceTable,
    plan: Plan,
    device: torch.device,
    agreement: MaskAgreement | None,
) -> tuple[float, int]:
    """Return the mean Dice over the cases of one table and their number."""
    cases, position = np.unique(np.asarray(table.case_of), return_inverse=True)
    structures = plan.data.structure_classes()
    sums = torch.zeros(3, len(cases), len(structures), dtype=torch.float64, device=device)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with evaluation_mode(network):
        for indices in _parts(np.arange(len(table)), BATCH):
            images, labels = (torch.from_numpy(array).to(device) for array in table.stack(indices))
            logits, _ = network(images.to(memory_format=torch.channels_last))
            decided = decide(activated(logits, plan.data), plan.data)
            if agreement is not None:
                agreement.add(decided)
            counts = overlap_counts(decided, labels, structures).double()
            sums.index_add_(1, torch.from_numpy(position[indices]).to(device), counts)
    return float(dice_from_counts(sums).mean().item()), len(cases)


def logits_of(
    network: nn.Module, table: SliceTable, indices: npt.NDArray[np.int64], device: torch.device
) -> Tensor:
    """Return the logits (B, C, H, W) of some slices at training size."""
    images, _ = table.stack(indices)
    logits: Tensor = network(
        torch.from_numpy(images).to(device, memory_format=torch.channels_last)
    )[0]
    return logits.float()


def activated(logits: Tensor, data: DataSettings) -> Tensor:
    """Return probabilities (B, C, H, W): of classes with softmax, of structures with sigmoid."""
    return logits.sigmoid() if data.activation == "sigmoid" else logits.softmax(1)


def decide(probabilities: Tensor, data: DataSettings) -> Tensor:
    """Return structures (B, S, H, W) bool from probabilities (B, C, H, W).

    Softmax: a pixel belongs to a structure when its most likely class is one of the structure's
    classes. Sigmoid: when its probability exceeds the threshold.
    """
    if data.activation == "sigmoid":
        return probabilities > data.threshold
    return structure_targets(probabilities.argmax(1), data.structure_classes())


def native_probabilities(
    logits: Tensor,
    native: Sequence[int],
    data: DataSettings,
    spacing: Sequence[float] | None = None,
) -> Iterator[Tensor]:
    """Yield the probabilities (C, Y, X) of each slice of logits (Z, C, h, w) at native size (Y, X).

    Used by evaluation and by `predict`, as in the published code of RAM-DSIR: the activation is
    applied at training size, the probabilities are interpolated bilinearly to the native size, and
    the decision is made there. Interpolating logits would move the edges. The function yields
    single slices because a volume at native size may not fit in memory.

    Args:
        logits: (Z, C, h, w).
        native: (Y, X).
        data: Decision rule, and the place of a slice on the training slice.
        spacing: (..., sy, sx) in mm, None if it is unknown.
    """
    frame = frame_of(native, data, spacing, logits.shape[-1])
    for part in torch.unbind(logits):
        probabilities = activated(frame.cut(part[None]), data)
        yield F.interpolate(
            probabilities, size=tuple(native), mode="bilinear", align_corners=False
        )[0]


def structures_from_logits(
    logits: Tensor,
    native: Sequence[int],
    data: DataSettings,
    spacing: Sequence[float] | None = None,
) -> Mask:
    """Return the structures (S, Z, Y, X) of logits (Z, C, h, w) before post-processing."""
    maps = native_probabilities(logits, native, data, spacing)
    decided = [decide(probabilities[None], data)[0] for probabilities in maps]
    masks: Mask = torch.stack(decided, dim=1).cpu().numpy()
    return masks


def post_process(masks: Mask, data: DataSettings, *, is_picture: bool) -> Mask:
    """Keep the largest component and fill holes of each structure; an empty mask stays empty.

    A structure whose classes are a subset of another's is nested in it. The outer one is processed
    first and the inner one is clipped to it, so that nested structures stay nested. With both steps
    off the masks are returned unchanged.

    Args:
        masks: (S, Z, Y, X).
        data: Which of the two steps are enabled.
        is_picture: A picture's components are connected by edges or corners (8-connectivity), a
            volume's by faces.
    """
    out = masks.copy()
    if not (data.largest_component or data.fill_holes):
        return out
    parts = [set(classes) for classes in data.structure_classes().values()]
    for inner in sorted(range(len(out)), key=lambda index: -len(parts[index])):
        outer = [out[index] for index, classes in enumerate(parts) if classes > parts[inner]]
        allowed = np.logical_and.reduce([np.ones_like(out[inner]), *outer])
        out[inner] = _clean(out[inner] & allowed, data, is_picture=is_picture) & allowed
    return out


def _clean(mask: Mask, data: DataSettings, *, is_picture: bool) -> Mask:
    """Apply the enabled steps to one structure (Z, Y, X)."""
    if data.largest_component:
        mask = largest_component(mask, 3 if is_picture else 1)
    if data.fill_holes:
        mask = np.stack([ndimage.binary_fill_holes(layer) for layer in mask])
    return mask


def largest_component(mask: Mask, connectivity: int) -> Mask:
    """Return the component with the most pixels, the first in scan order among equals.

    An empty mask stays empty.
    """
    structure = ndimage.generate_binary_structure(mask.ndim, connectivity)
    labels, number = ndimage.label(mask, structure)
    if number < 2:
        return mask
    sizes = np.bincount(labels.reshape(-1))[1:]
    largest: Mask = labels == 1 + int(np.argmax(sizes))
    return largest


def structure_masks(classes: npt.NDArray[np.uint8], data: DataSettings) -> Mask:
    """Return the structures (S, Z, Y, X) of a class map (Z, Y, X)."""
    return np.stack([np.isin(classes, indices) for indices in data.structure_classes().values()])


def case_rows(result: CaseResult, data: DataSettings) -> list[dict[str, Any]]:
    """Score one case; return a row of `payload.CASES_SCHEMA` for every structure.

    Distances are in native pixels or voxels, and also in millimetres if `data.spacing_unit` is
    `mm`.
    """
    rows = []
    spacing = result.case.spacing if data.spacing_unit == "mm" else None
    for name, predicted, true in zip(data.structures, result.prediction, result.truth, strict=True):
        prediction, truth, steps = _flat(predicted, true, spacing)
        pixels = segmentation_metrics(prediction, truth)
        row = {
            "case": result.case.alias,
            "structure": name,
            "dice": pixels.dice,
            "asd": pixels.asd,
            "assd": pixels.assd,
            "hd95": pixels.hd95,
            "hd95_max": pixels.hd95_max,
            "unit": "pixel",
            "empty_prediction": not prediction.any(),
            "empty_truth": not truth.any(),
            "dice_smooth1": pixels.dice_smooth1,
            "asd_compat": pixels.asd_compat,
        }
        if steps is not None:
            millimetres = segmentation_metrics(prediction, truth, spacing=steps)
            row |= {f"{metric}_mm": getattr(millimetres, metric) for metric in DISTANCES}
        rows.append({f"{metric}_mm": None for metric in DISTANCES} | row)
    return rows


def overlap_counts(
    decided: Tensor, labels: Tensor, structures: Mapping[str, Sequence[int]]
) -> Tensor:
    """Count pixels in the intersection, the prediction and the truth, (3, B, S).

    Ignored pixels are not counted.
    """
    valid = (labels != IGNORE).unsqueeze(1)
    truth, decided = structure_targets(labels, structures) & valid, decided & valid
    return torch.stack([(truth & decided).sum((2, 3)), decided.sum((2, 3)), truth.sum((2, 3))])


def dice_from_counts(counts: Tensor) -> Tensor:
    """Return the Dice of the (3, ...) counts of `overlap_counts`; 1 where both masks are empty."""
    both, predicted, true = counts
    total = predicted + true
    return torch.where(total > 0, 2 * both / total.clamp(min=1), torch.ones_like(total))


def slices_by_case(table: SliceTable) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield (case index, indices of its slices in order of z)."""
    owners = np.asarray(table.case_of)
    order = np.argsort(owners, kind="stable")
    edges = [0, *(np.flatnonzero(np.diff(owners[order])) + 1).tolist(), len(order)]
    for start, stop in pairwise(edges):
        if stop > start:
            yield int(owners[order[start]]), order[start:stop]


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluate without gradients and with running moments; restore the mode afterwards."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


def _parts(indices: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _picture(result: CaseResult, rows: list[dict[str, Any]], store: CaseStore) -> Picture:
    return choose_picture(
        store.image(result.case),
        result.classes,
        result.prediction,
        result.truth,
        alias=result.case.alias,
        dice=float(np.mean([row["dice"] for row in rows])),
    )


def _flat(
    prediction: Mask, truth: Mask, spacing: tuple[float, ...] | None
) -> tuple[Mask, Mask, tuple[float, ...] | None]:
    """Drop the third axis of a single slice, which would make every pixel a surface pixel."""
    if prediction.shape[0] > 1:
        return prediction, truth, spacing
    return prediction[0], truth[0], spacing[1:] if spacing is not None else None
