"""Which entries of a model are learnable, and arrays that have one value for each of them.

BatchNorm's running moments and DoFE's pool are part of a model's flat array but are no parameters:
an optimiser at the coordinator, a norm of an update and a control variate leave them out. Pure
NumPy. Legend: P floating-point weights, L learnable ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedsgcg.common.wire.norm_moments import MEAN, VARIANCE
from fedsgcg.common.wire.payload import Weights

POOL: Final = "knowledge.pool."
"""Prefix of the entries of DoFE's pool (`common.domain_pool`), which the coordinator fills."""


def is_learnable(name: str) -> bool:
    """Whether an entry of a network's state is learnable, by its name."""
    return not name.endswith((MEAN, VARIANCE)) and not name.startswith(POOL)


def learnable(weights: Weights) -> npt.NDArray[np.bool_]:
    """Return (P,) whether each value of a model is learnable."""
    return np.concatenate(
        [
            np.full(int(np.prod(shape, dtype=np.int64)), is_learnable(name))
            for name, shape in weights.layout
        ]
        or [np.zeros(0, np.bool_)]
    )


def split_learnable(weights: Weights, values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Return values (L,) by the name of their entry, in its shape.

    Raises:
        ValueError: Another number of values.
    """
    entries = [(name, shape) for name, shape in weights.layout if is_learnable(name)]
    sizes = [int(np.prod(shape, dtype=np.int64)) for _, shape in entries]
    if values.shape != (sum(sizes),):
        raise ValueError(f"values: found shape {values.shape}, expected ({sum(sizes)},)")
    parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
    return {name: part.reshape(shape) for (name, shape), part in zip(entries, parts, strict=True)}


def join_learnable(
    weights: Weights, entries: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float32]:
    """Return (L,) the values of all learnable entries of a model; zero for one that is absent."""
    parts = [
        np.asarray(entries[name], np.float32).reshape(-1)
        if name in entries
        else np.zeros(int(np.prod(shape, dtype=np.int64)), np.float32)
        for name, shape in weights.layout
        if is_learnable(name)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts])
