"""The form in which a trained model leaves: `federation.codec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedsgcg.common.wire.codecs import encode_rounded, encode_values
from fedsgcg.common.wire.payload import Weights

RESIDUAL = "codec.residual"
"""Entry of a site's state: what the rounding of its earlier differences dropped (P,)."""


def code_weights(
    codec: str, trained: Weights, received: Weights | None, before: Mapping[str, Tensor]
) -> tuple[Weights, bytes, dict[str, Tensor]]:
    """Code a trained model as the difference from the received one.

    Args:
        codec: `none`, `lossless` or `bf16`.
        trained: The trained model.
        received: The model of the request.
        before: The site's state before the round.

    Returns:
        The model as the coordinator will decode it, the coded bytes (empty for `none`), and entries
        for the site's state after the round.

    Raises:
        FedsgcgError: PAY-122 for a change outside the range of bfloat16.
    """
    if codec == "none" or received is None:
        return trained, b"", {}
    if codec == "lossless":
        return trained, encode_values(trained.values, received.values), {}
    kept = before.get(RESIDUAL)
    residual = None if kept is None else kept.numpy()
    coded, values, left = encode_rounded(trained.values, received.values, residual)
    return replace(trained, values=values), coded, {RESIDUAL: torch.from_numpy(left)}
