"""What an aggregation rule asks of a site besides training: more metrics, and a state.

| rule | metric of the reply | state |
| --- | --- | --- |
| `fedbn` | | BatchNorm layers (`clients.own_norm`) |
| `feddg_ga` | `validation_dice_trained` | |
| `fedce` | `validation_dice_without` | the model sent last (`clients.without_site`) |

`fedprox` and `scaffold` change the gradient (`clients.corrections`). A metric is absent where the
site has no validation case, or its floors withhold their results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fedsgcg.clients.own_norm import norm_state
from fedsgcg.clients.request import SiteRequest
from fedsgcg.clients.training import load_weights
from fedsgcg.clients.without_site import merged_without, sent_model
from fedsgcg.common.heads import without_heads
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.payload import Weights

Judge = Callable[[SiteRequest, nn.Module], dict[str, float]]
"""Returns `validation_dice` of a network and more, or nothing."""


def keeps_norm(plan: Plan) -> bool:
    """Whether the site keeps its own BatchNorm layers."""
    return plan.federation.aggregator == "fedbn"


def state_of_rule(plan: Plan, network: nn.Module, trained: Weights) -> dict[str, Tensor]:
    """Return what the rule needs of a trained model in the next round."""
    if keeps_norm(plan):
        return norm_state(network)
    return sent_model(trained) if plan.federation.aggregator == "fedce" else {}


def metrics_of_trained(task: SiteRequest, network: nn.Module, judge: Judge) -> dict[str, float]:
    """Return the validation Dice of the trained model, for FedDG-GA."""
    if task.plan.federation.aggregator != "feddg_ga":
        return {}
    found = judge(task, network)
    return {"validation_dice_trained": found["validation_dice"]} if found else {}


def metrics_without_site(
    task: SiteRequest, state: Mapping[str, Tensor], judge: Judge
) -> dict[str, float]:
    """Return the validation Dice of the merged model without this site, for FedCE."""
    plan, received = task.plan, task.request.weights
    if plan.federation.aggregator != "fedce" or received is None:
        return {}
    averaged = not plan.recalibrates
    others = merged_without(received, state, task.request.options, averaged=averaged)
    if others is None:
        return {}
    network = build_network(
        plan.network, plan.data.in_channels, plan.data.out_channels, generator_seed=None
    )
    load_weights(network, without_heads(others))
    found = judge(task, network.to(task.device))
    return {"validation_dice_without": found["validation_dice"]} if found else {}
