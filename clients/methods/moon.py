"""MOON: contrast between models.

z is the mean over space of the network's deepest map for one image.

Legend: B batch, A channels of the deepest map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.device import autocast_for
from fedsgcg.clients.methods.base import Loss, Source, View
from fedsgcg.clients.methods.guidance import Guide
from fedsgcg.clients.methods.steps import code_of, constant_copy, with_code
from fedsgcg.common.settings.plan import Plan


class Moon(Source):
    """MOON: an image's code is near that of the received model, away from the previous model's.

    Formula: L = L_supervised - mu * log( e^(cos(z, z_g)/tau) / (e^(cos(z, z_g)/tau) +
        e^(cos(z, z_p)/tau)) ), with the codes z_g of the received model and z_p of the model that
        this site sent in its last round.
    Leaves: weights; the previous model stays at the site.
    Defaults: mu = 1, tau = 0.5 as published. The code is the pooled bottleneck itself instead of a
        trained projection to 256 channels: it has 256 channels at base width 16. In a site's first
        round both models are the received one, and the term is the constant log 2.
    Source: Li et al., Model-Contrastive Federated Learning, CVPR 2021, eq. 3.
    """

    parts = ("loss_supervised", "loss_contrast")

    def __init__(self, network: nn.Module, plan: Plan, domains: int, device: torch.device) -> None:
        super().__init__(network, plan, domains, device)
        self._received = constant_copy(network)
        self.local["previous"] = constant_copy(network)

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the supervised loss plus the weighted contrast."""
        with autocast_for(self._dtype, self.device):
            logits, features, code = with_code(self.network, batch.images)
        view = View("source", logits.float(), features)
        total, parts = self.supervised(batch, [view])
        with torch.no_grad(), autocast_for(self._dtype, self.device):
            received = code_of(self._received, batch.images)
            previous = code_of(self.local["previous"], batch.images)
        settings = self.plan.method.moon
        contrast = model_contrast(code, received, previous, settings.temperature)
        return total + settings.weight * contrast, parts | {"loss_contrast": contrast.detach()}

    def finish(self) -> None:
        """Keep the trained model as the next round's previous one."""
        self.local["previous"].load_state_dict(self.network.state_dict())


def model_contrast(code: Tensor, received: Tensor, previous: Tensor, temperature: float) -> Tensor:
    """Return the mean over the images of MOON's eq. 3.

    Args:
        code: (B, A) of the trained network.
        received: (B, A) of the received model, the positive.
        previous: (B, A) of the site's previous model, the negative.
        temperature: tau.
    """
    positive, negative = (F.cosine_similarity(code, other) for other in (received, previous))
    return F.softplus((negative - positive) / temperature).mean()
