"""FedCE: the merged model without this site's own part, from which its contribution is judged.

The coordinator sends the digests and weights w of the models that it merged. A site finds its own
by the digest of what it sent, so that a reply that was late or refused is not subtracted, and names
of other sites are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fedsgcg.common.wire.learnable import learnable
from fedsgcg.common.wire.messages import SHARES
from fedsgcg.common.wire.norm_moments import VARIANCE
from fedsgcg.common.wire.payload import Weights

SENT: Final = "fedce.model"
"""The values of the model that this site sent last, in its state."""
DIGEST: Final = "fedce.digest"


def sent_model(weights: Weights) -> dict[str, Tensor]:
    """Return a sent model as entries of the site's state."""
    digest = np.frombuffer(bytes.fromhex(weights.digest()), np.uint8)
    return {
        SENT: torch.from_numpy(weights.values.copy()),
        DIGEST: torch.from_numpy(digest.copy()),
    }


def merged_without(
    received: Weights, state: Mapping[str, Tensor], options: Mapping[str, Any], *, averaged: bool
) -> Weights | None:
    """Return (x - w x_s) / (1 - w), the weighted mean of the other sites' models.

    Args:
        received: x, the merged model.
        state: The site's state, with x_s.
        options: Options of the request, with the weights of the merged models.
        averaged: Whether x has averaged running moments, from which those of the site can be
            subtracted; pooled ones are kept.

    Returns:
        The model; None where x does not contain this site's model, or no other.
    """
    share = own_share(state, options)
    if share is None or state[SENT].shape != received.values.shape:
        return None
    own = state[SENT].numpy().astype(np.float64)
    rest = (received.values.astype(np.float64) - share * own) / (1.0 - share)
    values = np.where(averaged | learnable(received), rest, received.values).astype(np.float32)
    others = replace(received, values=values)
    for name, array in others.to_state().items():  # views into `values`
        if name.endswith(VARIANCE):
            np.maximum(array, 0.0, out=array)  # below zero by rounding
    return others


def own_share(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> float | None:
    """Return w in [0, 1); None without one."""
    shares = options.get(SHARES)
    if DIGEST not in state or not isinstance(shares, dict):
        return None
    share = shares.get(bytes(state[DIGEST].numpy()).hex())
    valid = isinstance(share, float) and math.isfinite(share) and 0 <= share < 1
    return share if valid else None
