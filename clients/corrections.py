"""Corrections of the gradient that an aggregation rule asks of the sites: FedProx and SCAFFOLD.

A correction is added to the accumulated gradients of a step, before the optimiser uses them, so
that it works with every method and number of micro-batches. With SGD it is exactly the published
update; with Adam it is part of the gradient whose moments Adam takes. Tensors keep their address,
and no value is read, so that a step can be captured as a CUDA graph (`clients.cuda_graph`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsgcg.common.errors import fail
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.learnable import join_learnable, split_learnable
from fedsgcg.common.wire.payload import Weights

CONTROL: Final = "control."
"""Prefix of the site's control variate in its state."""


class Correction(Protocol):
    """A change of the gradients of every step."""

    def apply(self) -> None:
        """Change the gradients in place."""

    def state(self, steps: int) -> dict[str, Tensor]:
        """Return what stays at the site after a number of steps."""


class Proximal:
    """FedProx: the gradient mu (x_s - x) of mu/2 |x_s - x|^2.

    x is the received model, x_s the site's. Source: Li et al. 2020 (arXiv 1812.06127), eq. 2.

    Args:
        network: Holds the received weights.
        mu: Weight of the term.
    """

    def __init__(self, network: nn.Module, mu: float) -> None:
        self._mu = mu
        self._parameters = list(network.parameters())
        self._received = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def apply(self) -> None:
        """Add the term's gradient; a parameter without a gradient has not moved."""
        for parameter, received in zip(self._parameters, self._received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - received, alpha=self._mu)

    def state(self, steps: int) -> dict[str, Tensor]:
        """Return nothing."""
        del steps
        return {}


class ControlVariates:
    """SCAFFOLD: adds c - c_s to the gradients, and averages the gradients without it.

    After K steps of SGD at a constant rate l the published c_s - c + (x - x_s) / (K l) is the mean
    of the uncorrected gradients (option II). That mean is what is taken here, because it is also
    defined for Adam and for a rate that decays.

    Source: Karimireddy et al. 2020 (arXiv 1910.06378).

    Args:
        network: The network that is trained.
        common: c by the name of the parameter; zero where it is absent.
        own: c_s, in the same way.
    """

    def __init__(
        self, network: nn.Module, common: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> None:
        self._parameters = dict(network.named_parameters())
        self._sums: dict[str, Tensor] = {}
        self._offsets: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            self._sums[name] = torch.zeros_like(parameter)
            self._offsets[name] = torch.zeros_like(parameter)
            for variates, sign in ((common, 1.0), (own, -1.0)):
                if name in variates:
                    self._offsets[name].add_(variates[name].to(parameter.device), alpha=sign)

    @torch.no_grad()
    def apply(self) -> None:
        """Add each gradient to its sum, then correct it."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._sums[name].add_(parameter.grad)
                parameter.grad.add_(self._offsets[name])

    def state(self, steps: int) -> dict[str, Tensor]:
        """Return the next c_s: the mean gradient of the steps."""
        return {f"{CONTROL}{name}": total / max(steps, 1) for name, total in self._sums.items()}


def corrections_of(
    network: nn.Module,
    plan: Plan,
    state: Mapping[str, Tensor],
    common: Mapping[str, Tensor],
) -> Sequence[Correction]:
    """Return the corrections of a plan's aggregation rule, none for most rules.

    Args:
        network: Holds the received weights, on the device of the training.
        plan: The plan.
        state: The site's state after its last round.
        common: SCAFFOLD's global control variate by parameter; empty in the first round.
    """
    federation = plan.federation
    if federation.aggregator == "fedprox" and federation.fedprox.mu > 0:
        return [Proximal(network, federation.fedprox.mu)]
    if federation.aggregator == "scaffold":
        own = {
            name.removeprefix(CONTROL): tensor
            for name, tensor in state.items()
            if name.startswith(CONTROL)
        }
        return [ControlVariates(network, common, own)]
    return []


def received_control(
    weights: Weights | None, values: NDArray[np.float32] | None
) -> dict[str, Tensor]:
    """Return the global control variate of a request by parameter; empty without one.

    Raises:
        FedsgcgError: PAY-121 for another number of values, or values that are not finite.
    """
    if weights is None or values is None:
        return {}
    try:
        entries = split_learnable(weights, values)
    except ValueError as error:
        raise fail("PAY-121", found=str(error), expected="one value per weight") from error
    if not np.isfinite(values).all():
        raise fail("PAY-121", found="values that are not finite", expected="finite values")
    return {name: torch.from_numpy(array.copy()) for name, array in entries.items()}


def sent_control(weights: Weights, state: Mapping[str, Tensor]) -> NDArray[np.float32] | None:
    """Return the site's control variate (L,) for the reply; None if there is none in its state."""
    entries = {
        name.removeprefix(CONTROL): tensor.detach().cpu().numpy()
        for name, tensor in state.items()
        if name.startswith(CONTROL)
    }
    return join_learnable(weights, entries) if entries else None
