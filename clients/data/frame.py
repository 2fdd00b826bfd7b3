"""Where a native slice (Y, X) is on the square training slice (S, S), and the way back.

`data.aspect=squeeze` fills the square, so that a slice that is not square changes its shape.
`data.aspect=pad` keeps the shape: the longer side fills the square, the rest is filled. With
`data.spacing` all slices have pixels of one size in millimetres; a slice that is too large for the
square is made smaller, so that nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsgcg.common.errors import fail
from fedsgcg.common.settings.plan import DataSettings

Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True)
class Frame:
    """A rectangle of the training slice.

    Attributes:
        side: S.
        height: Rows of the resized slice.
        width: Columns of the resized slice.
    """

    side: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the resized slice."""
        return self.height, self.width

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column at which it starts; it is in the middle."""
        return (self.side - self.height) // 2, (self.side - self.width) // 2

    def put(self, resized: NDArray[Kind], fill: float) -> NDArray[Kind]:
        """Return resized slices (..., height, width) on filled squares (..., S, S)."""
        if self.size == (self.side, self.side):
            return resized
        top, left = self.corner
        square = np.full((*resized.shape[:-2], self.side, self.side), fill, resized.dtype)
        square[..., top : top + self.height, left : left + self.width] = resized
        return square

    def cut(self, square: Tensor) -> Tensor:
        """Return the part of maps (..., S, S) that shows the slice: (..., height, width)."""
        top, left = self.corner
        return square[..., top : top + self.height, left : left + self.width]


def frame_of(
    native: Sequence[int],
    data: DataSettings,
    spacing: Sequence[float] | None = None,
    side: int = 0,
) -> Frame:
    """Return the place of a native slice on the training slice.

    Args:
        native: (Y, X).
        data: `image_size`, `aspect`, `spacing` and whether millimetres are real (`spacing_unit`).
        spacing: (..., sy, sx) in mm, None if it is unknown; pixels then count as square.
        side: S, if it is not `image_size`.

    Raises:
        FedsgcgError: DAT-190 with `data.spacing` for a slice of unknown pixel size.
    """
    side = side or data.image_size
    known = spacing if spacing is not None and data.spacing_unit == "mm" else None
    if data.spacing:
        if known is None:
            raise fail(
                "DAT-190",
                found="no voxel size",
                expected=f"a voxel size, for slices of {data.spacing:g} mm a pixel",
                action="Correct the header, or set data.spacing=0.",
            )
        rows, columns = (
            count * step / data.spacing for count, step in zip(native, known[-2:], strict=True)
        )
        shrink = min(1.0, side / max(rows, columns))
    elif data.aspect == "pad":
        steps = known[-2:] if known is not None else (1.0, 1.0)
        rows, columns = (count * step for count, step in zip(native, steps, strict=True))
        shrink = side / max(rows, columns)
    else:
        return Frame(side, side, side)
    height, width = (min(side, max(1, round(count * shrink))) for count in (rows, columns))
    return Frame(side, height, width)
