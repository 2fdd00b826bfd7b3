"""Use a trained model from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fedsgcg.clients.confidence import Gaussians
from fedsgcg.clients.device import choose_device
from fedsgcg.clients.evaluation import BATCH
from fedsgcg.clients.predict.model import load_model as read_model
from fedsgcg.clients.predict.predictor import Prediction, Predictor
from fedsgcg.common.errors import fail
from fedsgcg.common.images.read import PICTURE, PLANES, Volume, check_image
from fedsgcg.common.run_folder import paths


@dataclass(frozen=True)
class SegmentationModel:
    """A trained model on a device.

    Attributes:
        card: Content of `model.json`: method, data, training hospitals, protocol.
        structures: What it segments, in the order of the first axis of masks and probabilities.
        kinds: The images it was trained on: `axial volume`, `coronal volume`,
            `sagittal volume` or `picture`.
    """

    card: dict[str, Any] = field(repr=False)
    structures: tuple[str, ...]
    kinds: tuple[str, ...]
    _predictor: Predictor = field(repr=False)

    def predict(self, image: str | Path | ArrayLike) -> Prediction:
        """Segment one image, with the preprocessing and the decisions of evaluation.

        Args:
            image: A file of any format that is read, the folder of a DICOM series, or an array:
                (Z, Y, X) of a volume, slices first and in the plane that the model was trained on;
                (Y, X) or (Y, X, 3) of a picture. A uint8 picture has the scale 0 to 255.

        Returns:
            Masks (S, Z, Y, X), label values (Z, Y, X) and, if requested, probabilities and
            confidence. The geometry of an array is unknown: its spacing is 1.

        Raises:
            FedsgcgError: DAT-103, DAT-106, DAT-107, DAT-108, DAT-115, DAT-160 to DAT-164 or DAT-169
                for an image that cannot be used, MOD-806 for one of another kind than the training
                images.
        """
        if isinstance(image, str | Path):
            return self._predictor.predict(Path(image))
        volume = _volume_of(np.asarray(image), self.kinds)
        check_image(volume, "array")
        return self._predictor.apply(volume)


def load_model(
    path: str | Path,
    *,
    device: str = "auto",
    threads: int = 1,
    batch: int = BATCH,
    probability: bool = False,
    confidence: bool = False,
    code: str | Sequence[str] = (),
) -> SegmentationModel:
    """Load the model of one cell of a study.

    Args:
        path: Folder with `model.json`, `model.safetensors` and, for `confidence`,
            `prototypes.arrow`.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        threads: CPU threads.
        batch: Slices in a forward pass.
        probability: Keep the probability of every structure.
        confidence: Compute a confidence map from the distance to the global prototypes.
        code: Import path of an own network that may be imported, or several.

    Raises:
        FedsgcgError: MOD-801 to MOD-805 and MOD-807 for files that are missing, damaged or
            contradict each other, POL-706 for an own network that `code` does not name, CFG-004
            for a device that is not available.
    """
    model = read_model(Path(path), (code,) if isinstance(code, str) else code)
    chosen = choose_device(device, threads)
    gaussians = None
    if confidence:
        if model.prototypes is None:
            action = "Leave out confidence, or train with method.statistics=true."
            raise fail("MOD-807", where=str(path), expected=paths.PROTOTYPES, action=action)
        gaussians = Gaussians.of(model.prototypes, chosen)
    predictor = Predictor(model, chosen, batch, probability, gaussians)
    return SegmentationModel(dict(model.card), tuple(model.data.structures), model.kinds, predictor)


def _volume_of(array: np.ndarray[Any, Any], kinds: Sequence[str]) -> Volume:
    """Give an array the form of an image that was read from a file."""
    plane = next((name for name in PLANES if f"{name} volume" in kinds), None)
    if PICTURE in kinds and _is_picture(array, plane):
        channels = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        values = channels.astype(np.float32)
        return Volume(values, np.eye(4), (1.0, 1.0, 1.0), True, array.dtype == np.uint8)
    if array.ndim == 3 and plane is not None:
        spacing = (1.0, 1.0, 1.0)
        return Volume(
            array.astype(np.float32), np.eye(4), spacing, False, plane=plane, has_size=False
        )
    raise fail(
        "DAT-106",
        where="array",
        found=f"shape {array.shape}",
        expected=" or ".join(_SHAPES[kind.split()[-1]] for kind in dict.fromkeys(kinds)),
    )


_SHAPES = {"volume": "(Z, Y, X) of a volume", PICTURE: "(Y, X) or (Y, X, 3) of a picture"}


def _is_picture(array: np.ndarray[Any, Any], plane: str | None) -> bool:
    """Whether an array is a picture; for a model of both kinds, (Y, X, 3) uint8 is one."""
    colour = array.ndim == 3 and array.shape[-1] == 3
    return array.ndim == 2 or (colour and (plane is None or array.dtype == np.uint8))
