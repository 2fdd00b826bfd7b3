"""Secure sums of a plan: what they add up, and plans that cannot use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from fedsgcg.common.errors import Problem
from fedsgcg.common.secure_sums.contribution import Scheme
from fedsgcg.common.secure_sums.fixed_point import power_of_two
from fedsgcg.common.secure_sums.history import reference_of
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import TRAIN, Request

SUM: Final = "sum"
"""Option of a request with what it needs to know of the secure sum that it is part of."""
ADDITIVE: Final = ("fedavg", "fedprox", "fedbn", "fedavgm", "fedadam", "fedyogi")
"""Aggregation rules that need no more than the mean of the models."""
PASSES: Final = 4
"""A pass counts a pixel at most so often: two views, and slices again to complete a batch."""


def scheme_of(plan: Plan, kind: str, request: Request, sites: int, examples: float) -> Scheme:
    """Return what the answers to a request add up to.

    Args:
        plan: The plan.
        kind: Type of the request.
        request: The request: model, prototypes, options.
        sites: Most sites of the sum.
        examples: Most training slices of a site, as the coordinator states it.
    """
    settings, training = plan.privacy.secure_sums, kind == TRAIN
    measures = bool(request.options.get("moments"))
    described = (
        plan.described_in_training(request.identity.round)
        if training
        else plan.method.statistics and (bool(request.options.get("classes")) or not measures)
    )
    most = power_of_two(max(examples, 1.0))
    return Scheme(
        sites=sites,
        examples=most,
        pixels=power_of_two(PASSES * (most + plan.method.batch_size) * plan.data.image_size**2),
        weights=request.weights if training else None,
        equal=plan.federation.weighting == "sites",
        shape=(plan.data.num_classes, plan.network.num_features) if described else None,
        centre=request.prototypes.mean if request.prototypes is not None else None,
        feature=1.0 if plan.unit_features else settings.largest_feature,
        measured=request.weights if measures else None,
        activation=settings.largest_activation,
        change=settings.largest_change,
        update_norm=settings.update_norm,
    )


def reference(kind: str, request: Request) -> str:
    """Return the digest of what a request's answers are about (`secure_sums.history`)."""
    model = request.weights.digest() if request.weights is not None else ""
    prototypes = request.prototypes.digest() if request.prototypes is not None else ""
    options = {name: value for name, value in request.options.items() if name not in (SUM, "held")}
    return reference_of(kind, model, prototypes, options)


def secure_sum_problems(plan: Plan, training: Sequence[str]) -> Iterator[Problem]:
    """Yield PRV-952 and PRV-953 for everything in a plan that secure sums cannot serve.

    Args:
        plan: The plan.
        training: The training sites.
    """
    settings = plan.privacy.secure_sums
    if not settings.enabled:
        return
    if len(training) < settings.fewest_sites:
        yield Problem(
            "PRV-953",
            f"{len(training)} training hospitals",
            f"{settings.fewest_sites} or more (privacy.secure_sums.fewest_sites)",
            "train on more hospitals; of a sum of two each knows the other's part",
            "privacy.secure_sums.enabled",
        )
    for where, found, expected, holds in _needs(plan, training):
        if not holds:
            action = "change it, or set privacy=floors"
            yield Problem("PRV-952", found, expected, action, where)


def _needs(plan: Plan, training: Sequence[str]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield (setting, found, expected with the reason, whether it holds)."""
    federation, prototypes = plan.federation, plan.prototypes
    name = federation.aggregator
    expected = f"{' | '.join(ADDITIVE)}: other rules compare or weight the models of single sites"
    yield "federation.aggregator", name, expected, name in ADDITIVE
    expected = "warn or off: answers of single sites are not seen, so none can be screened"
    yield "federation.screening", "reject", expected, federation.screening != "reject"
    expected = "local: amplitudes are collected from single sites"
    sharing = plan.method.ram.sharing
    yield "method.ram.sharing", sharing, expected, not plan.method.mixes or sharing == "local"
    dp, expected = plan.privacy.dp, "no noise with secure sums: their ranges are for exact numbers"
    yield "privacy.dp", "noise", expected, not dp.channels and not dp.central_noise
    expected = "none: masked numbers cannot be compressed"
    yield "federation.codec", federation.codec, expected, federation.codec == "none"
    expected = "0: the average's moments and the fitted layer need passes of their own"
    yield "federation.ema", str(federation.ema), expected, federation.ema == 0
    fitted = plan.method.sgcg.recalibration
    yield "method.sgcg.recalibration", str(fitted), expected, not fitted
    expected = "1: the shares of single sites are not seen"
    yield "federation.most_share", str(federation.most_share), expected, federation.most_share == 1
    expected = "another method: its pool holds a part of each hospital"
    yield "method", plan.method.name, expected, plan.method.name != "dofe"
    unlabelled = [site for site in training if plan.role(site) == "unlabelled"]
    expected = "no hospital without labels: its decoder is not part of the mean"
    yield "unlabelled", ", ".join(unlabelled), expected, not unlabelled
    if not plan.method.statistics:
        return
    expected = "cumulative | discount | lagged | restart | momentum: it needs each site's own part"
    own = prototypes.memory in ("overlay", "online")
    yield "prototypes.memory", prototypes.memory, expected, not own
    expected = "full: the sum is of counts, means and scatter"
    yield "prototypes.shared", prototypes.shared, expected, prototypes.shared == "full"
    expected = "no use of the differences between hospitals, which the sum does not show"
    yield "method", plan.shift, expected, not plan.shift
    expected = "pixels: the sum pools all pixels"
    yield "prototypes.weighting", prototypes.weighting, expected, prototypes.weighting == "pixels"
    expected = "0: the statistics of single sites are not seen"
    yield "prototypes.trimmed", str(prototypes.trimmed), expected, prototypes.trimmed == 0
