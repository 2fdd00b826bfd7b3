"""Models of a round wait on disk for the others, not in memory.

The merge adds the sites' models in the order of their names, and screening and robust rules compare
all of them, so none can be merged on arrival. The values of a received model are therefore written
to a file of the run folder and mapped: the kernel reads them when they are used and drops them when
memory is short. The memory of a round is that of one message, however many sites there are, and the
merged bits are the same as before, whatever the order of arrival.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsgcg.common.files.disk import refusals
from fedsgcg.common.wire.payload import Weights


def spilled(weights: Weights, folder: Path) -> Weights:
    """Return the same model with its values in a file that has no name.

    The file disappears with its last user, also after `kill -9`.

    Args:
        weights: A received model.
        folder: Folder on a disk with room for the models of a round.

    Raises:
        FedsgcgError: SRV-401 if the disk refuses.
    """
    if not weights.values.size:
        return weights
    return replace(weights, values=spilled_values(weights.values, folder))


def spilled_values(values: npt.NDArray[np.float32], folder: Path) -> npt.NDArray[np.float32]:
    """Return the same values in a file that has no name, as `spilled`."""
    if not values.size:
        return values
    with refusals(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(np.ascontiguousarray(values, dtype=np.float32).data)
        file.flush()
        return np.memmap(file, dtype=np.float32, mode="r", shape=values.shape)
