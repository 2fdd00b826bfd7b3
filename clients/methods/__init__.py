"""The training methods, each a function from what the network gave to the loss of one step.

A method reads the logits, the penultimate map and the labels of one batch, and the global prototypes where it learns
from them. It runs in float32 outside autocast (methods.md 1.7). To add one, write a file here and name it in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from clients.methods import sgcg, supervised
from clients.methods.guidance import Guidance
from common.plan import Plan

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Guidance | None, Plan], Loss]

METHODS: dict[str, Method] = {"source": supervised.loss, "sgcg": sgcg.loss}

__all__ = ["METHODS", "Guidance", "Loss", "Method"]
