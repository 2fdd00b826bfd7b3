"""Training-only heads: modules that a method trains and shares, and prediction does not use.

A method that needs more modules than the network, for example a projection of its deepest map,
registers a builder in `HEADS` under its name. The builder is a function of the plan, so that the
coordinator and every site build the same modules. They become the child `training_heads` of the
network and thus part of its state: round 1 starts from weights drawn from the plan's seed, they
are sent, checked, screened, merged and checkpointed with all other weights, and the optimiser
trains them. The network's own initial weights do not depend on them.

Prediction does not need them: `without_heads` removes them from a model before it is evaluated or
saved (`model.safetensors`, `model.json`), so that the selected model is a plain network.

To add a head:

1. write the modules in `common/` and register `HEADS["my_method"] = builder`; the builder returns
   modules by name, none where the settings need none;
2. use them in the method: `head(self.network, "name")`.

Linear and convolution layers, BatchNorm and GroupNorm are initialised here (`initialise`); a module
with parameters of its own must set them to constants. A head must not keep running moments: it is
never in evaluation mode, so its BatchNorm needs `track_running_stats=False`. Modules that stay at
the site belong to `Source.local` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsgcg.common.networks import build_network, initialise, without_draws
from fedsgcg.common.projection_heads import segclr_heads
from fedsgcg.common.seeding import stream_seed
from fedsgcg.common.settings.methods import JIGSAW_PERMUTATIONS
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.payload import Weights

CHILD: Final = "training_heads"
"""Name of the network's child that holds the heads; their entries start with `training_heads.`."""


def _jigsaw(plan: Plan) -> dict[str, nn.Module]:
    """Return JiGen's head on the mean of the deepest map: the permutation of the tiles."""
    network = plan.network
    channels = network.num_features if network.is_own else 16 * network.base_width
    return {"jigsaw": nn.Linear(channels, JIGSAW_PERMUTATIONS + 1)}


HEADS: Final[dict[str, Callable[[Plan], Mapping[str, nn.Module]]]] = {
    "jigen": _jigsaw,
    "segclr": segclr_heads,
}
"""Method -> builder of its heads by name."""


def build_trained(plan: Plan, generator_seed: int | None) -> nn.Module:
    """Build what a method trains: the network of the plan with the method's heads.

    Args:
        plan: Network, data and method.
        generator_seed: Seed of the weights, as in `build_network`; the heads have a stream of their
            own.

    Raises:
        FedsgcgError: CFG-011 for a network by import path that cannot be used.
        ValueError: A head keeps running moments.
    """
    network = build_network(
        plan.network, plan.data.in_channels, plan.data.out_channels, generator_seed
    )
    if (build := HEADS.get(plan.method.name)) is None:
        return network
    with without_draws():
        heads = nn.ModuleDict(dict(build(plan)))
    if not heads:
        return network
    for name, module in heads.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise ValueError(f"{name}: found running moments, expected track_running_stats=False")
    if generator_seed is not None:
        seed = stream_seed(generator_seed, CHILD)
        initialise(heads, torch.Generator().manual_seed(seed))
    network.add_module(CHILD, heads)
    return network


def head(network: nn.Module, name: str) -> nn.Module:
    """Return one of the heads of a network that `build_trained` built."""
    return network.get_submodule(f"{CHILD}.{name}")


def state_of(network: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return the state of a network as NumPy arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}


def without_heads(weights: Weights) -> Weights:
    """Return the part of a model that prediction uses; the same object if there are no heads."""
    prefix = f"{CHILD}."
    if not any(name.startswith(prefix) for name, _ in (*weights.layout, *weights.counters)):
        return weights
    kept = {
        name: np.asarray(array)
        for name, array in weights.to_state().items()
        if not name.startswith(prefix)
    }
    return Weights.from_state(kept)
