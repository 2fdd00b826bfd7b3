"""Steps of an optimiser at the coordinator, whose gradient is the mean update of the sites.

BatchNorm's running moments are averaged, never stepped: a momentum would move a variance below
zero. Integer counters are those of `merge_weights`. Arithmetic is float64. Legend: P floating-point
weights, L learnable ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedsgcg.common.wire.learnable import learnable
from fedsgcg.common.wire.payload import Weights

Array = npt.NDArray[np.float64]


def mean_update(previous: Weights, merged: Weights) -> Array:
    """Return (L,) the learnable part of the merged model minus the previous one."""
    mask = learnable(previous)
    return merged.values[mask].astype(np.float64) - previous.values[mask]


def stepped(previous: Weights, merged: Weights, change: Array) -> Weights:
    """Return the merged model whose learnable weights are the previous ones plus a change (L,)."""
    mask = learnable(previous)
    values = merged.values.copy()
    values[mask] = (previous.values[mask] + change).astype(np.float32)
    return replace(merged, values=values)
