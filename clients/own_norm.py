"""FedBN: every site keeps the BatchNorm layers that it trained instead of the received ones.

The site's own layers (scale, offset, running moments, counter) are part of its state and replace
the received ones before training and before class statistics that describe training. The reply
contains them, and the coordinator averages them for hospitals that have none of their own: the
held-out hospital and every other one that receives the model. Validation during the run scores that
averaged model, because it is the one that is selected and handed out.

Source: Li et al. 2021 (arXiv 2102.07623); averaging for an unseen hospital is this project's
choice, as the paper has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORM: Final = "norm."
"""Prefix of the layers in the site's state."""


def norm_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the BatchNorm layers of a network as entries of the site's state."""
    return {
        f"{NORM}{layer}.{name}": tensor.detach().clone()
        for layer, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for name, tensor in module.state_dict().items()
    }


def take_own_norm(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the BatchNorm layers of a network by those of a state; none in the first round."""
    own = {
        name.removeprefix(NORM): tensor for name, tensor in state.items() if name.startswith(NORM)
    }
    if own:
        network.load_state_dict(own, strict=False)
