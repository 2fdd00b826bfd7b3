"""The hospital's Flower app: it enrols, describes its pixels, trains and evaluates; read top to bottom, it is a round.

Every answer leaves through `clients.guard.egress`. Every failure becomes a code; its text, which may name a patient,
stays in the site's own `errors.log`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from clients.data.store import SliceTable, fingerprint
from clients.evaluation import evaluate_cases, validation_dice
from clients.guard.contents import shared_contents
from clients.guard.egress import apply_floors, release
from clients.methods.class_statistics import (
    NormMode,
    sample_features,
    site_moments,
    site_statistics,
)
from clients.methods.partners import site_amplitudes
from clients.methods.running_guide import ONLINE, build_guide, keep_statistics, kept_statistics
from clients.request import SPLITS, SiteRequest, handle, require_role
from clients.training import client_name, load_weights, train_round, weights_of
from common.errors import fail
from common.feature_samples import FILE, write_feature_samples
from common.images.contents import CONTENT_HASHES
from common.networks import build_network
from common.seeding import stream, stream_seed
from common.settings.federation import SHARES
from common.statistics import ClassStatistics
from common.wire.messages import Reply
from common.wire.norm_moments import NormMoments
from common.wire.payload import encode_cases

CHANNELS = 3  # a slice with its two neighbours, or one slice three times


def build_client_app(tree: Mapping[str, Any] | None = None) -> ClientApp:
    """Build the app of every site.

    Args:
        tree: Resolved settings, for simulations; without them each message reads Flower's run config.
    """
    app = ClientApp()

    def answering(
        work: Callable[[SiteRequest], RecordDict],
    ) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            return Message(handle(work, message, context, tree), reply_to=message)

        return answer

    app.query("enrol")(answering(enrol))
    app.query("statistics")(answering(send_statistics))
    app.query("amplitudes")(answering(send_amplitudes))
    app.train()(answering(train))
    app.evaluate()(answering(evaluate))
    return app


def enrol(visit: SiteRequest) -> RecordDict:
    """Say who this site is and how many usable cases it has; case names stay behind their aliases.

    `data` is a digest by which the coordinator notices that the site's files or splits changed within a run;
    `content_hashes`, where the site allows it, are those by which it finds images that two hospitals have.
    """
    stores, splits = visit.stores, SPLITS
    cases = {
        split: [case for store in stores for case in store.cases if case.split == split]
        for split in splits
    }
    details: dict[str, Any] = {
        "site": visit.site,
        "roles": list(visit.plan.site.roles),
        "cases": {split: len(part) for split, part in cases.items()},
        "patients": {split: len({case.patient for case in part}) for split, part in cases.items()},
        "slices": {split: sum(len(store.slices(split)) for store in stores) for split in splits},
        "kinds": sorted({store.kind for store in stores}),
        "problems": visit.public_problems(),
        "data": " ".join(fingerprint(store) for store in stores),
        "shares": list(visit.plan.site.shares),
    }
    if (contents := shared_contents(stores, visit.identity, visit.policy)) is not None:
        details[CONTENT_HASHES] = contents
    return send(visit, Reply(visit.identity, visit.site, details=details))


def send_statistics(visit: SiteRequest) -> RecordDict:
    """Measure the received model on the training slices: class statistics, BatchNorm's moments, or both.

    The request's options say which: `moments`, `classes`, and for the latter alone `norm_mode`, which is
    `prototypes.norm_mode` unless the coordinator asks for the normalisation of evaluation.
    """
    require_role(visit, "train")
    options, network = visit.request.options, load_global_model(visit)
    mode: NormMode | None = "running" if options.get("norm_mode") == "running" else None
    measured = moments(visit, network) if options.get("moments") else None
    wanted = visit.plan.method.statistics and (options.get("classes") or measured is None)
    found = statistics(visit, network, mode) if wanted else None
    return send(visit, Reply(visit.identity, visit.site, statistics=found, moments=measured))


def train(visit: SiteRequest) -> RecordDict:
    """Describe and judge the received model, then train it on the site's own slices and send it back."""
    require_role(visit, "train")
    plan, network, number = visit.plan, load_global_model(visit), visit.identity.round
    described = statistics(visit, network) if plan.described_in_training(number) else None
    before = validation_metrics(visit, network)
    _, state = visit.state.load(number)
    own = apply_floors_to(visit, described) if plan.prototypes.memory == "overlay" else None
    guide = build_guide(
        visit.request.prototypes,
        state,
        own,
        plan,
        number,
        visit.device,
        held=held_parts(visit.request.options),
    )
    figures, state = train_round(
        network,
        visit.stores,
        plan,
        round_number=number,
        guide=guide,
        device=visit.device,
        amplitudes=visit.request.amplitudes,
        state=state,
    )
    if plan.prototypes.memory == "online":
        described = kept_statistics(state, ONLINE)
        own = apply_floors_to(visit, described)
    if state or own is not None:
        visit.state.store(number, state | keep_statistics(own))
    return send(
        visit, Reply(visit.identity, visit.site, weights_of(network), described, before | figures)
    )


def held_parts(options: Mapping[str, Any]) -> frozenset[str]:
    """Digests of the sites' parts that the prototypes of a request are made of."""
    stated = options.get("held")
    return frozenset(str(part) for part in stated) if isinstance(stated, list) else frozenset()


def send_amplitudes(visit: SiteRequest) -> RecordDict:
    """Send the amplitudes of the site's training slices, where its own file allows it (methods.md 2.8)."""
    require_role(visit, "train")
    ram = visit.plan.method.ram
    wanted = SHARES.get(ram.sharing, "")
    if wanted not in visit.plan.site.shares:
        raise fail("ROL-202", found=f"site.shares={list(visit.plan.site.shares)}", expected=wanted)
    amplitudes = site_amplitudes(visit.stores, ram, visit.site, visit.plan.seed, visit.device)
    return send(visit, Reply(visit.identity, visit.site, amplitudes=amplitudes))


def evaluate(visit: SiteRequest) -> RecordDict:
    """Score the received model case by case: a held-out site on its test cases, a training site on its validation."""
    split = str(visit.request.options.get("split", "test"))
    require_role(visit, *(("train",) if split == "validation" else ("heldout", "observer")))
    pictures = visit.home / "pictures.arrow" if split == "test" else None
    network = load_global_model(visit)
    keep_features(visit, network, split)
    rows = evaluate_cases(network, visit.stores, visit.plan, split, visit.device, pictures=pictures)
    metrics = {"dice": float(np.mean([row["dice"] for row in rows]))} if rows else {}
    if (
        split == "validation"
    ):  # the measure of every other round too, so that models can be compared
        metrics |= validation_metrics(visit, network)
    return send(visit, Reply(visit.identity, visit.site, metrics=metrics, cases=encode_cases(rows)))


def keep_features(visit: SiteRequest, network: nn.Module, split: str) -> None:
    """Keep features of some pixels in the site's folder, with `site.feature_samples`; nothing of it is sent."""
    if not visit.plan.site.feature_samples:
        return
    for store in visit.stores:
        rng = stream(visit.plan.seed, store.site, "feature samples")
        found = sample_features(network, store.slices(split), visit.plan, visit.device, rng)
        home = visit.home if len(visit.stores) == 1 else visit.home.parent / store.site
        write_feature_samples(
            home / FILE, *found, store.site, visit.plan.label or visit.plan.method.name
        )


def validation_metrics(visit: SiteRequest, network: nn.Module) -> dict[str, float]:
    """Source-validation Dice of a network, slice by slice at training size; nothing without a validation case."""
    dice, cases = validation_dice(network, visit.stores, visit.plan, visit.device)
    return {"validation_dice": dice, "validation_cases": float(cases)} if cases else {}


def load_global_model(visit: SiteRequest) -> nn.Module:
    """The plan's network on the site's device, holding the weights of the request."""
    if visit.request.weights is None:
        raise fail("PAY-106", found="a request without weights", expected="the global model")
    plan = visit.plan
    network = build_network(plan.network, CHANNELS, plan.data.out_channels, generator_seed=None)
    load_weights(network, visit.request.weights)
    network.to(visit.device)
    return network


def training_slices(visit: SiteRequest) -> tuple[list[SliceTable], list[np.random.Generator]]:
    """The training slices of each of the site's hospitals, and the generator that orders them in a pass."""
    plan, number = visit.plan, visit.identity.round
    tables = [store.slices("train") for store in visit.stores]
    return tables, [stream(plan.seed, number, store.site, "statistics") for store in visit.stores]


def moments(visit: SiteRequest, network: nn.Module) -> NormMoments:
    """Moments of BatchNorm's inputs over the site's augmented training slices under the network's weights."""
    tables, rngs = training_slices(visit)
    name = client_name([store.site for store in visit.stores])
    seed = stream_seed(visit.plan.seed, visit.identity.round, name, "moments")
    generator = torch.Generator(visit.device).manual_seed(seed)
    return site_moments(network, tables, visit.plan, visit.device, rngs, generator)


def statistics(
    visit: SiteRequest, network: nn.Module, norm_mode: NormMode | None = None
) -> ClassStatistics:
    """Class statistics of the site's training slices under the network's weights, pooled over its hospitals."""
    tables, rngs = training_slices(visit)
    return site_statistics(network, tables, visit.plan, visit.device, rngs, norm_mode)


def apply_floors_to(
    visit: SiteRequest, described: ClassStatistics | None
) -> ClassStatistics | None:
    """The site's statistics as they will leave, without the classes that its floors withhold."""
    if described is None:
        return None
    return apply_floors(described, visit.patients, visit.plan.privacy, visit.different_pixels)[0]


def send(visit: SiteRequest, reply: Reply) -> RecordDict:
    """Let a reply out through the door."""
    return release(
        reply,
        visit.home,
        kind=visit.kind,
        privacy=visit.plan.privacy,
        classes=list(visit.plan.data.classes),
        patients=visit.patients if reply.statistics is not None else None,
        pixels=visit.different_pixels if reply.statistics is not None else None,
        sharing=visit.policy.sharing if visit.policy else None,
    )


app = build_client_app()
