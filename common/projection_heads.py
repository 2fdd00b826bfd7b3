"""SegCLR's projection heads, which are trained, shared and no part of the saved model.

A head aggregates the encoder's deepest map (w = base width: 16w channels at 1/16 of the
resolution) and projects it with fully connected layers (arXiv 2405.05336, section II-E):

    pool      mean over all positions: 16w values
    channel   1 x 1 convolution to c channels, which keeps the position: c h w values

SimCLR projects with two layers. SimSiam uses three and a predictor of two, with BatchNorm after
every layer but the predictor's last. The BatchNorm layers keep no running moments, because a head
is never in evaluation mode.

Legend: B images, h, w positions of the deepest map, d length of the projection.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from fedsgcg.common.settings.plan import Plan

DOWNSAMPLING = 16
SIMSIAM_BOTTLENECK = 4
"""Width of the predictor's hidden layer: the projection's length divided by this, as published."""


class ProjectionHead(nn.Module):
    """Aggregates a map and projects it.

    Args:
        channels: Channels of the deepest map.
        kept: Channels that a 1 x 1 convolution keeps at every position; 0 averages over all
            positions instead.
        positions: h w.
        hidden: Width of the hidden layers.
        outputs: d.
        layers: Number of fully connected layers; with three, BatchNorm also follows the last.
    """

    def __init__(
        self, channels: int, kept: int, positions: int, hidden: int, outputs: int, layers: int
    ) -> None:
        super().__init__()
        self.aggregate: nn.Module = nn.AdaptiveAvgPool2d(1)
        inputs = channels
        if kept:
            self.aggregate, inputs = nn.Conv2d(channels, kept, 1), kept * positions
        widths = [inputs, *[hidden] * (layers - 1)]
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [nn.Linear(before, after, bias=False), _norm(after), nn.ReLU()]
        parts.append(nn.Linear(widths[-1], outputs, bias=layers < 3))
        if layers >= 3:
            parts.append(nn.BatchNorm1d(outputs, affine=False, track_running_stats=False))
        self.layers = nn.Sequential(*parts)

    def forward(self, deepest: Tensor) -> Tensor:
        """Project deepest maps (B, 16w, h, w) to (B, d)."""
        projected: Tensor = self.layers(self.aggregate(deepest).flatten(1))
        return projected


def segclr_heads(plan: Plan) -> dict[str, nn.Module]:
    """Return the heads of `method=segclr`: `projection` and, for SimSiam, `predictor`."""
    settings = plan.method.segclr
    simsiam = settings.contrast == "simsiam"
    heads: dict[str, nn.Module] = {
        "projection": ProjectionHead(
            16 * plan.network.base_width,
            settings.head_channels if settings.head == "channel" else 0,
            (plan.data.image_size // DOWNSAMPLING) ** 2,
            settings.hidden,
            settings.projection,
            3 if simsiam else 2,
        )
    }
    if simsiam:
        narrow = settings.projection // SIMSIAM_BOTTLENECK
        heads["predictor"] = nn.Sequential(
            nn.Linear(settings.projection, narrow, bias=False),
            _norm(narrow),
            nn.ReLU(),
            nn.Linear(narrow, settings.projection),
        )
    return heads


def _norm(width: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(width, track_running_stats=False)
