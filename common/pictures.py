"""Example slices with image, truth and prediction, as an Arrow file that stays at the site."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.common.errors import fail
from fedsgcg.common.files.atomic import replaced

MAX_STRUCTURES = 8  # one bit each in a byte; further structures are not drawn


@dataclass(frozen=True)
class Picture:
    """One slice of one case; the binary fields hold height * width bytes, `image` times channels.

    Attributes:
        case: Alias of the case.
        dice: Mean Dice of the case over its structures.
        z: Index of the slice.
        image: Values from 0 to 255: grey, or red, green and blue of each pixel.
        truth: True class indices.
        prediction: Bit s is set where structure s was predicted.
        truth_mask: Bit s is set where structure s truly is.
        height: Rows.
        width: Columns.
        channels: 1 for grey, 3 for colours.
    """

    case: str
    dice: float
    z: int
    image: bytes
    truth: bytes
    prediction: bytes
    truth_mask: bytes
    height: int
    width: int
    channels: int = 1


SCHEMA = pa.schema(
    [
        ("case", pa.string()),
        ("dice", pa.float64()),
        ("z", pa.int32()),
        ("image", pa.binary()),
        ("truth", pa.binary()),
        ("prediction", pa.binary()),
        ("truth_mask", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("channels", pa.int32()),
    ]
)


def choose_picture(
    image: npt.NDArray[np.float32],
    classes: npt.NDArray[np.uint8],
    prediction: npt.NDArray[np.bool_],
    truth: npt.NDArray[np.bool_],
    *,
    alias: str,
    dice: float,
) -> Picture:
    """Return the slice with the largest true area.

    Args:
        image: (Z, Y, X) in [0, 1]; (Z, Y, X, 3) in colour.
        classes: (Z, Y, X) true class indices.
        prediction: (S, Z, Y, X).
        truth: (S, Z, Y, X).
        alias: Alias of the case.
        dice: Mean Dice of the case.
    """
    z = int(np.argmax(truth.any(0).sum((1, 2))))
    shown = np.round(np.clip(image[z], 0.0, 1.0) * 255).astype(np.uint8)
    return Picture(
        case=alias,
        dice=dice,
        z=z,
        image=shown.tobytes(),
        truth=np.ascontiguousarray(classes[z]).tobytes(),
        prediction=bit_mask(prediction[:, z]).tobytes(),
        truth_mask=bit_mask(truth[:, z]).tobytes(),
        height=shown.shape[0],
        width=shown.shape[1],
        channels=shown.shape[2] if shown.ndim > 2 else 1,
    )


def bit_mask(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Join (S, Y, X) masks into one byte per pixel, structure s in bit s."""
    joined = np.zeros(masks.shape[1:], np.uint8)
    for bit, mask in enumerate(masks[:MAX_STRUCTURES]):
        joined |= mask.astype(np.uint8) << np.uint8(bit)
    return joined


def write_pictures(path: Path, pictures: Sequence[Picture], structures: Sequence[str]) -> None:
    """Write the pictures atomically as an Arrow IPC file.

    Raises:
        FedsgcgError: SITE-501 if the site's folder cannot be written.
    """
    schema = SCHEMA.with_metadata({"structures": json.dumps(list(structures)[:MAX_STRUCTURES])})
    table = pa.Table.from_pylist([asdict(picture) for picture in pictures], schema=schema)
    try:
        with (
            replaced(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_table(table)
    except OSError as error:
        raise fail(
            "SITE-501",
            where=str(path),
            found=str(error),
            expected="a site folder that can be written",
        ) from error
