"""RAM-DSIR: segments both views, keeps them consistent and restores the image from its copy.

L_ram = seg(x) + seg(x_f) + 0.5 * KD(p_f, p) + 0.1 * sum over domains of MSE(rec_d(x5(x_f)), x)

See "Loss" and "Network" in docs/explanation/ram-dsir.md; x_f is the mixed copy and x5 the deepest
map.

Legend: B batch, C output channels, H, W height and width, D source domains of the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.device import autocast_for
from fedsgcg.clients.methods.base import Loss, Source, View, segmentation_loss
from fedsgcg.clients.methods.guidance import IGNORE
from fedsgcg.clients.methods.sgcg import SgCG
from fedsgcg.common.networks import RestorationDecoder, UNet, build_restoration
from fedsgcg.common.seeding import stream_seed
from fedsgcg.common.settings.plan import Plan

CLAMP: Final = 1e-7
"""Distance of probabilities from 0 and 1; the published loss is infinite when one saturates."""


class Ram(Source):
    """RAM-DSIR: segments a slice and its amplitude-mixed copy, and restores one from the other.

    Formula: L = L_supervised(x) + L_supervised(x_f) + 0.5 KD(p_f, p) + 0.1 MSE(restored x, x).
    Leaves: weights; with `method.ram.sharing=summary` or `bank` amplitudes, by the site's consent.
        The restoration decoder stays at the site.
    Defaults: weights, window and ratios as published.
    Source: Zhou et al., RAM-DSIR, ECCV 2022; docs/explanation/ram-dsir.md.
    """

    mixes = True
    parts = (*Source.parts, "loss_consistency", "loss_restoration")

    def __init__(self, network: nn.Module, plan: Plan, domains: int, device: torch.device) -> None:
        super().__init__(network, plan, domains, device)
        if plan.method.ram.restoration > 0:
            seed = stream_seed(plan.seed, "restoration")
            width, channels = plan.network.base_width, plan.data.in_channels
            decoder = build_restoration(width, domains, seed, channels).to(device)
            self.local["restoration"] = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups; the encoder learns more slowly with the decoder on."""
        if not self.local:
            return super().groups()
        encoder = list(self._unet().encoder.parameters())
        inside = {id(parameter) for parameter in encoder}
        rest = [parameter for parameter in self.network.parameters() if id(parameter) not in inside]
        return [
            {"params": encoder, "factor": self.plan.method.ram.encoder_rate},
            {"params": [*rest, *self.local.parameters()], "factor": 1.0},
        ]

    def forward(self, batch: Batch) -> list[View]:
        """Run the network on the slices and on their mixed copies, in separate passes."""
        self._deepest: Tensor | None = None
        return [self.view("source", batch.images), self._mixed_view(batch)]

    def supervised(self, batch: Batch, views: Sequence[View]) -> Loss:
        """Return the loss of both segmentations, their consistency and the restoration."""
        settings, data = self.plan.method.ram, self.plan.data
        plain, mixed = views
        both = segmentation_loss(plain.logits, batch.labels, data) + segmentation_loss(
            mixed.logits, batch.labels, data
        )
        # Reported as the mean of the views, for comparison with methods of one view; `total` has
        # the sum.
        valid = (batch.labels != IGNORE).unsqueeze(1)
        bernoulli = settings.divergence == "symmetric_bernoulli"
        probabilities = [probability(view.logits, data.activation) for view in views]
        consistency = consistency_loss(
            probabilities[0], probabilities[1], valid, symmetric=bernoulli
        )
        restoration = self._restoration(batch)
        total = both + settings.consistency * consistency + settings.restoration * restoration
        parts = {
            "loss_supervised": both / 2,
            "loss_consistency": consistency,
            "loss_restoration": restoration,
        }
        return total, {name: value.detach() for name, value in parts.items()}

    def _mixed_view(self, batch: Batch) -> View:
        if batch.mixed is None:
            raise ValueError("batch.mixed: found None, expected the amplitude-mixed copies")
        if not self.local:
            return self.view("ram", batch.mixed)
        network = self._unet()
        with autocast_for(self._dtype, self.device):
            maps = network.encode(batch.mixed)
            logits, features = network.decode(maps)
        self._deepest = maps[-1]
        return View("ram", logits.float(), features)

    def _unet(self) -> UNet:
        """Return the network as a U-Net, whose deepest map is the restoration decoder's input."""
        if not isinstance(self.network, UNet):
            raise TypeError(
                f"network: found {type(self.network).__name__}, expected UNet for restoration"
            )
        return self.network

    def _restoration(self, batch: Batch) -> Tensor:
        """Return the sum over the domains of the mean squared error of the restored slices."""
        decoder = self.local["restoration"] if self.local else None
        if not isinstance(decoder, RestorationDecoder) or self._deepest is None:
            return batch.images.new_zeros(())
        sizes, errors = list(batch.sizes), []
        pairs = zip(
            torch.split(self._deepest, sizes), torch.split(batch.images, sizes), strict=True
        )
        for domain, (deepest, images) in enumerate(pairs):
            with autocast_for(self._dtype, self.device):
                restored = decoder(deepest, domain)
            errors.append(F.mse_loss(restored.float(), images))
        return torch.stack(errors).sum()


class RamSgCG(Ram, SgCG):
    """The papers' method: RAM-DSIR's views and loss plus SgCG's contrastive term.

    Formula: L = L_RAM-DSIR + lambda * L_contrast.
    Leaves: as `ram`, and count, mean and covariance of every class.
    Defaults: those of `ram` and `sgcg`.
    Source: SgCG, eqs. 11-13; docs/explanation/sgcg.md.
    """


def probability(logits: Tensor, activation: str) -> Tensor:
    """Return probabilities (B, C, H, W), clamped to [1e-7, 1 - 1e-7]."""
    value = logits.softmax(1) if activation == "softmax" else logits.sigmoid()
    return value.clamp(CLAMP, 1 - CLAMP)


def consistency_loss(
    first: Tensor, second: Tensor, valid: Tensor, *, symmetric: bool = False
) -> Tensor:
    """Return the symmetric Kullback-Leibler divergence of two predictions, averaged over elements.

    mean(b (log b - log a)) + mean(a (log a - log b)) = mean((a - b)(log a - log b)). Both
    predictions receive gradient. See "Loss" in docs/explanation/ram-dsir.md.

    Args:
        first: (B, C, H, W) probabilities in (0, 1).
        second: Probabilities of the other view.
        valid: (B, 1, H, W) bool, pixels that are not ignored.
        symmetric: Add the complementary half (1 - p), which gives the divergence of Bernoulli
            variables.
    """
    difference = first - second
    value = difference * (first.log() - second.log())
    if symmetric:
        value = value - difference * (torch.log1p(-first) - torch.log1p(-second))
    return (value * valid).sum() / (valid.sum() * first.shape[1]).clamp(min=1)
