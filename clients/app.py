"""The hospital's Flower app; its handlers appear in the order of a round.

The site enrols, measures statistics, trains and evaluates. Every reply leaves through
`clients.guard.egress`. Every failure becomes an error code; its text, which may name a patient,
stays in the site's own `errors.log`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedsgcg.clients.adaptation import Reference, adapted, hospital_batches
from fedsgcg.clients.coding import code_weights
from fedsgcg.clients.corrections import received_control, sent_control
from fedsgcg.clients.data.pairs import check_pairs
from fedsgcg.clients.data.store import SliceTable
from fedsgcg.clients.evaluation import (
    CONSTANT,
    DECIMALS,
    MaskAgreement,
    evaluate_cases,
    summarise_cases,
    validation_dice,
)
from fedsgcg.clients.guard.budget import spent
from fedsgcg.clients.guard.contents import shared_contents
from fedsgcg.clients.guard.egress import apply_floors, release
from fedsgcg.clients.methods import Guide
from fedsgcg.clients.methods.class_statistics import (
    NormMode,
    sample_features,
    site_block_means,
    site_moments,
    site_statistics,
)
from fedsgcg.clients.methods.partners import MeanMixer, mixing_space, site_amplitudes
from fedsgcg.clients.methods.private_statistics import private_statistics
from fedsgcg.clients.methods.projections import site_projections
from fedsgcg.clients.methods.running_guide import (
    ONLINE,
    build_guide,
    statistics_from_state,
    statistics_to_state,
)
from fedsgcg.clients.own_norm import take_own_norm
from fedsgcg.clients.private_training import train_private_round
from fedsgcg.clients.request import SiteRequest, handle, require_role
from fedsgcg.clients.rules import (
    keeps_norm,
    metrics_of_trained,
    metrics_without_site,
    state_of_rule,
)
from fedsgcg.clients.training import (
    client_name,
    load_weights,
    round_slices,
    train_round,
    weights_of,
)
from fedsgcg.common.differential_privacy.accounting import PATIENT, Spending
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.feature_samples import FILE, write_feature_samples
from fedsgcg.common.heads import build_trained
from fedsgcg.common.images.contents import CONTENT_HASHES, IMAGE_SUMMARY
from fedsgcg.common.networks import build_network
from fedsgcg.common.seeding import stream, stream_seed
from fedsgcg.common.settings.adaptation import AMPLITUDE
from fedsgcg.common.settings.differential_privacy import CHANNELS, DpSettings
from fedsgcg.common.settings.dp_rules import round_spending
from fedsgcg.common.settings.federation import SHARES, TRAINING
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.amplitudes import AmplitudeSummary
from fedsgcg.common.wire.block_means import BlockMeans
from fedsgcg.common.wire.messages import (
    DATA,
    STATISTICS,
    SUM_CHECK,
    SUM_KEYS,
    SUM_OPEN,
    SUM_SHARES,
    SUMMARY,
    TRAIN,
    Reply,
)
from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.common.wire.payload import encode_cases


def build_client_app(tree: Mapping[str, Any] | None = None) -> ClientApp:
    """Build the app of every site.

    Args:
        tree: Resolved settings, for simulations. If None, each message reads Flower's run config.
    """
    app = ClientApp()

    def answering(
        work: Callable[[SiteRequest], RecordDict],
    ) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            return Message(handle(work, message, context, tree), reply_to=message)

        return answer

    app.query("enrol")(answering(enrol))
    app.query("statistics")(answering(summed(send_statistics)))
    app.query("amplitudes")(answering(send_amplitudes))
    app.train()(answering(summed(train)))
    for step in (SUM_KEYS, SUM_SHARES, SUM_CHECK, SUM_OPEN):
        app.query(step.removeprefix("query."))(answering(answer_sum))
    app.evaluate()(answering(evaluate))
    return app


def summed(work: Callable[[SiteRequest], RecordDict]) -> Callable[[SiteRequest], RecordDict]:
    """Answer a repeated request of a secure sum with the same masked numbers."""

    def answer(task: SiteRequest) -> RecordDict:
        if task.sums is not None and (sent := task.sums.sent_before()) is not None:
            return release(sent, task.home, kind=task.kind, privacy=task.plan.privacy, key=task.key)
        return work(task)

    return answer


def answer_sum(task: SiteRequest) -> RecordDict:
    """Take a step of a secure sum: keys, shares, agreement, or shares that open the sum."""
    require_role(task, *TRAINING)
    if task.sums is None:
        raise fail("PRV-959", found="a step of a secure sum", expected="a plan with secure sums")
    reply = Reply(task.identity, task.site, details=task.sums.answer())
    return release(reply, task.home, kind=task.kind, privacy=task.plan.privacy, key=task.key)


def enrol(task: SiteRequest) -> RecordDict:
    """Report the site's name and its numbers of usable cases, as far as they may leave.

    The digest that every reply contains (`send`) shows the coordinator whether the site's files or
    splits change during a run. `content_hashes`, present where the site allows it, reveal images
    that two hospitals share.

    Raises:
        FedsgcgError: POL-720 for a site whose cases the floors keep out of its role, TRN-311 for
            one whose images have no pairs for the method; the run then starts without the site,
            instead of failing later.
    """
    stores = task.stores
    task.require_sample("train" if task.plan.trains(task.site) else "test")
    if task.plan.trains(task.site):
        check_pairs(stores, task.plan)
        task.require_budget()
    details: dict[str, Any] = {
        "site": task.site,
        "roles": list(task.plan.site.roles),
        **task.public_counts(),
        "kinds": sorted({store.kind for store in stores}),
        "colour": any(store.has_colour for store in stores),
        "problems": task.public_problems(),
        "shares": list(task.plan.site.shares),
    }
    if (contents := shared_contents(stores, task.identity, task.policy)) is not None:
        details[CONTENT_HASHES] = contents
    if (summary := task.image_summary()) is not None:
        details[IMAGE_SUMMARY] = summary
    return send(task, Reply(task.identity, task.site, details=details))


def send_statistics(task: SiteRequest) -> RecordDict:
    """Measure class statistics, BatchNorm moments or both on the training slices.

    The request's options `moments` and `classes` select which. `norm_mode` applies to class
    statistics only: it is `prototypes.norm_mode` unless the coordinator requests `running`, the
    normalisation of evaluation. A site without labels has no classes to measure.
    """
    require_role(task, *TRAINING)
    task.require_sample("train")
    task.spend("releases")
    options, network = task.request.options, load_global_model(task)
    mode: NormMode | None = "running" if options.get("norm_mode") == "running" else None
    measured = moments(task, network) if options.get("moments") else None
    if keeps_norm(task.plan) and mode is None:
        # After a merge, the layers are those of this round; before training, of the last one.
        _, state = task.state.load(task.identity.round + (measured is not None))
        take_own_norm(network, state)
    wanted = task.plan.method.statistics and (options.get("classes") or measured is None)
    if wanted and task.role == "unlabelled" and not task.plan.method.describes_projections:
        raise fail("ROL-212", where=task.site, found="a request for class statistics")
    reply = Reply(task.identity, task.site, moments=measured)
    raw = bool(options.get("raw"))
    found = describe(task, network, mode, raw=raw) if wanted else None
    return send(task, with_description(reply, found))


def train(task: SiteRequest) -> RecordDict:
    """Measure and validate the received model, train it on the site's slices and send it back."""
    require_role(task, *TRAINING)
    task.require_sample("train")
    require_round(task)
    task.spend("releases")
    plan, number = task.plan, task.identity.round
    network = load_global_model(task)
    _, state = task.state.load(number)
    before = validation_metrics(task, network)
    before |= metrics_without_site(task, state, validation_metrics)
    if keeps_norm(plan):
        take_own_norm(network, state)
    described = describe(task, network) if plan.described_in_training(number) else None
    own = None
    if isinstance(described, ClassStatistics) and plan.prototypes.memory == "overlay":
        own = apply_floors_to(task, described)
    guide = build_guide(
        task.request.prototypes,
        state,
        own,
        plan,
        number,
        task.device,
        held=held_parts(task.request.options),
        shift=task.request.shift,
    )
    earlier = state
    figures, state = train_on_site(task, network, guide, state)
    if plan.prototypes.memory == "online":
        described = statistics_from_state(state, ONLINE)
        own = apply_floors_to(task, described)
    trained = weights_of(network)
    state |= state_of_rule(plan, network, trained)
    sent, coded, residual = code_weights(
        plan.federation.codec, trained, task.request.weights, earlier
    )
    state |= residual
    if state or own is not None:
        task.state.store(number, state | statistics_to_state(own))
    metrics = before | figures | metrics_of_trained(task, network, validation_metrics)
    reply = Reply(task.identity, task.site, sent, metrics=metrics, coded=coded)
    reply = replace(reply, control_variates=sent_control(trained, state))
    return send(task, with_description(reply, described))


def train_on_site(
    task: SiteRequest, network: nn.Module, guide: Guide | None, state: dict[str, torch.Tensor]
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Train the network in place for one round, with noise if the plan has it in the weights."""
    plan, number = task.plan, task.identity.round
    if plan.privacy.dp.weights:
        noise, _ = task.charge("weights", round_spending(plan))
        return train_private_round(
            network,
            task.stores,
            plan,
            round_number=number,
            guide=guide,
            device=task.device,
            noise=noise,
            state=state,
        )
    return train_round(
        network,
        task.stores,
        plan,
        round_number=number,
        guide=guide,
        device=task.device,
        amplitudes=task.request.amplitudes,
        state=state,
        control=received_control(task.request.weights, task.request.control_variates),
    )


def held_parts(options: Mapping[str, Any]) -> frozenset[str]:
    """Return the digests of the site statistics that a request's prototypes contain."""
    stated = options.get("held")
    return frozenset(str(part) for part in stated) if isinstance(stated, list) else frozenset()


def send_amplitudes(task: SiteRequest) -> RecordDict:
    """Send the amplitudes of the site's training slices, if its own file allows it.

    See "Federated" in docs/explanation/ram-dsir.md.
    """
    require_role(task, "train")
    ram = task.plan.method.ram
    required = SHARES.get(ram.sharing, "")
    if required not in task.plan.site.shares:
        raise fail("ROL-202", found=f"site.shares={list(task.plan.site.shares)}", expected=required)
    task.require_sample("train")
    task.spend("releases")
    amplitudes = site_amplitudes(task.stores, ram, task.site, task.plan.seed, task.device)
    return send(task, Reply(task.identity, task.site, amplitudes=amplitudes))


def evaluate(task: SiteRequest) -> RecordDict:
    """Score the received model case by case.

    A held-out site is scored on its test cases, a training site on its validation cases, and a
    hospital of the setting `unlabelled` on those that its manifest assigns to `test`.
    """
    split = str(task.request.options.get("split", "test"))
    if split == "validation":
        require_role(task, "train")
    else:
        own = [task.role] if task.site in task.plan.unlabelled else []
        require_role(task, "heldout", "observer", *own)
    pictures = task.home / "pictures.arrow" if split == "test" else None
    if split == "test":
        task.require_sample("test")
    task.spend("evaluations")
    if split == "validation" and not task.validates:
        return send(task, Reply(task.identity, task.site, cases=encode_cases([])))
    network = load_global_model(task, trained=False)
    agreement = MaskAgreement()
    if way := str(task.request.options.get("adapt", "")):
        rows = adapted_rows(task, network, way, split, agreement)
    else:
        save_features(task, network, split)
        rows = evaluate_cases(
            network,
            task.stores,
            task.plan,
            split,
            task.device,
            pictures=pictures,
            agreement=agreement,
        )
    if task.policy is not None and agreement.is_constant:
        raise constant_prediction(agreement)
    metrics = {"dice": float(np.mean([row["dice"] for row in rows]))} if rows else {}
    details: dict[str, Any] = {}
    if not task.shares_cases(split):
        metrics = {name: round(value, DECIMALS) for name, value in metrics.items()}
        details, rows = {SUMMARY: summarise_cases(rows, task.floor)}, []
    if split == "validation":
        # The same metric as in every round, so that the final model can be compared with them.
        metrics |= validation_metrics(task, network)
    reply = Reply(task.identity, task.site, metrics=metrics, cases=encode_cases(rows))
    return send(task, replace(reply, details=details))


def adapted_rows(
    task: SiteRequest, network: nn.Module, way: str, split: str, agreement: MaskAgreement
) -> list[dict[str, Any]]:
    """Score the model on the test cases after its adaptation to their images.

    Raises:
        FedsgcgError: TRN-330 for a way that is not in the plan, or a request without what it needs.
    """
    plan = task.plan
    if way not in plan.adapt.by or split != "test":
        found = f"{way} for the cases of {split}"
        expected = f"one of {', '.join(plan.adapt.by) or 'none'}, for test cases"
        raise fail("TRN-330", found=found, expected=expected)
    rows: list[dict[str, Any]] = []
    for store in task.stores:
        table = store.slices(split)
        mixer = None
        if way == AMPLITUDE and task.request.amplitudes:
            summary = AmplitudeSummary.decode(task.request.amplitudes)
            if summary.space != (space := mixing_space([table])):
                found, expected = f"amplitudes of {summary.space}s", f"those of {space}s"
                raise fail("TRN-330", found=found, expected=expected)
            mixer = MeanMixer(summary, plan.method.ram, stream(plan.seed, "unused"))
        reference = Reference(task.request.prototypes, plan.unit_features, mixer)
        batches = partial(hospital_batches, table)
        with adapted(
            network, way, batches, plan.adapt, plan.data, reference, task.device
        ) as changed:
            rows += evaluate_cases(changed, [store], plan, split, task.device, agreement=agreement)
    return rows


def constant_prediction(agreement: MaskAgreement) -> FedsgcgError:
    """Return the error for a model that predicts the same mask for every image."""
    return fail(
        "POL-724",
        found=f"predictions of different slices agree in {max(agreement.values):.1%} of their "
        "pixels",
        expected=f"less than {CONSTANT:.0%}",
        action="evaluate a trained model; results of a constant prediction are volumes of organs",
    )


def save_features(task: SiteRequest, network: nn.Module, split: str) -> None:
    """Save features of some pixels in the site's folder if `site.feature_samples` is set.

    They are never sent.
    """
    if not task.plan.site.feature_samples:
        return
    for store in task.stores:
        rng = stream(task.plan.seed, store.site, "feature samples")
        found = sample_features(network, store.slices(split), task.plan, task.device, rng)
        home = task.home if len(task.stores) == 1 else task.home.parent / store.site
        write_feature_samples(
            home / FILE, *found, store.site, task.plan.label or task.plan.method.name
        )


def validation_metrics(task: SiteRequest, network: nn.Module) -> dict[str, float]:
    """Return the source-validation Dice at training size.

    Empty without a validation case, where the floors withhold the result, and at a site with a
    policy for a constant prediction.
    """
    if not task.validates:
        return {}
    agreement = MaskAgreement()
    dice, cases = validation_dice(network, task.stores, task.plan, task.device, agreement)
    if task.policy is not None:
        if agreement.is_constant:
            return {}
        dice = round(dice, DECIMALS)
    return {"validation_dice": dice, "validation_cases": float(cases)} if cases else {}


def load_global_model(task: SiteRequest, *, trained: bool = True) -> nn.Module:
    """Build the plan's network on the site's device and load the weights of the request.

    With `trained` the network has the method's training-only heads.
    """
    if task.request.weights is None:
        raise fail("PAY-106", found="a request without weights", expected="the global model")
    plan = task.plan
    channels = plan.data.in_channels, plan.data.out_channels
    network = build_trained(plan, None) if trained else build_network(plan.network, *channels, None)
    load_weights(network, task.request.weights)
    network.to(task.device)
    return network


def training_slices(task: SiteRequest) -> tuple[list[SliceTable], list[np.random.Generator]]:
    """Return the training slices of each hospital and the generators that order them."""
    plan, number = task.plan, task.identity.round
    tables = [store.slices("train") for store in task.stores]
    return tables, [stream(plan.seed, number, store.site, "statistics") for store in task.stores]


def require_round(task: SiteRequest) -> None:
    """Refuse a round that trains on too little data, whose update would show single images.

    Statistics that are summed up during training (`prototypes.memory=online`) need whole passes
    over the data: the difference of two rounds is the sum over the slices of one of them.

    Raises:
        FedsgcgError: POL-723.
    """
    if task.policy is None:
        return
    plan, tables = task.plan, [store.slices("train") for store in task.stores]
    names = [store.site for store in task.stores]
    used = round_slices(tables, plan, task.identity.round, names)
    slices = sum(map(len, used))
    patients = {
        (store.site, store.cases[index].patient)
        for store, table, numbers in zip(task.stores, tables, used, strict=True)
        for index in np.unique(table.case_of[numbers])
    }
    least = task.policy.round_slices
    partial = plan.prototypes.memory == "online" and slices < sum(map(len, tables))
    if slices >= least and len(patients) >= task.floor and not partial:
        return
    raise fail(
        "POL-723",
        found=f"{slices} slices of {len(patients)} patients",
        expected="all training slices, with prototypes.memory=online"
        if partial
        else f"{least} slices (round_slices) of {task.floor} patients (patient_floor) or more",
        action="raise method.steps_per_round or method.batch_size, or set steps_per_round=0",
    )


def moments(task: SiteRequest, network: nn.Module) -> NormMoments:
    """Measure the moments of BatchNorm's inputs over the site's augmented training slices."""
    tables, rngs = training_slices(task)
    name = client_name([store.site for store in task.stores])
    seed = stream_seed(task.plan.seed, task.identity.round, name, "moments")
    generator = torch.Generator(task.device).manual_seed(seed)
    return site_moments(network, tables, task.plan, task.device, rngs, generator)


def describe(
    task: SiteRequest,
    network: nn.Module,
    norm_mode: NormMode | None = None,
    *,
    raw: bool = False,
) -> ClassStatistics | BlockMeans:
    """Describe the site's training slices, pooled over its hospitals, in the form that may leave.

    Class statistics; block means with `prototypes.shared=means`; statistics with noise with
    `privacy.dp.channels=[statistics]`; statistics of the slices' projections with
    `method.segclr.global_negatives`. With `raw` they are those of the features as the output layer
    reads them, not of unit length.
    """
    plan, (tables, rngs) = task.plan, training_slices(task)
    if plan.method.describes_projections:
        seed = stream_seed(plan.seed, task.identity.round, task.site, "projections")
        generator = torch.Generator(task.device).manual_seed(seed)
        return site_projections(network, tables, plan, task.device, rngs, generator)
    if raw:
        plan = replace(plan, prototypes=replace(plan.prototypes, normalize=False))
    if plan.privacy.dp.statistics:
        noise, _ = task.charge("statistics", Spending(plan.privacy.dp.statistics_noise))
        return private_statistics(network, task.stores, plan, task.device, noise)
    if plan.prototypes.shared == "means":
        seed = stream_seed(plan.seed, task.identity.round, task.site, "blocks")
        generator = torch.Generator().manual_seed(seed)
        return site_block_means(
            network, tables, plan, task.device, rngs, norm_mode, generator=generator
        )
    return site_statistics(network, tables, plan, task.device, rngs, norm_mode)


def with_description(reply: Reply, described: ClassStatistics | BlockMeans | None) -> Reply:
    """Return the reply with what describes the site's slices."""
    if isinstance(described, BlockMeans):
        return replace(reply, block_means=described)
    return replace(reply, statistics=described)


def apply_floors_to(task: SiteRequest, described: ClassStatistics | None) -> ClassStatistics | None:
    """Return the site's statistics after the privacy floors."""
    if described is None:
        return None
    return apply_floors(described, task.patients, task.floors, task.distinct_pixels)[0]


def send(task: SiteRequest, reply: Reply) -> RecordDict:
    """Release a reply, with the digest of the site's data, through `clients.guard.egress`."""
    reply = replace(reply, details={**reply.details, DATA: task.data_digest()})
    privacy, patients, pixels = task.floors, None, None
    if reply.statistics is not None and privacy.dp.statistics:
        # The counts are noisy numbers of patients; classes below the floor are already left out.
        patients, privacy = reply.statistics.count.astype(np.int64), replace(privacy, min_pixels=1)
    elif reply.statistics is not None or reply.block_means is not None:
        patients, pixels = task.patients, task.distinct_pixels
    note = ""
    if privacy.dp.channels and (reply.statistics is not None or reply.weights is not None):
        total = spent(task.home, task.budget.delta)
        note = privacy_note(privacy.dp, total, task.budget.delta)
        reply = replace(reply, metrics={**reply.metrics, "epsilon": total})
    return release(
        reply,
        task.home,
        kind=task.kind,
        privacy=privacy,
        classes=list(task.plan.described),
        patients=patients,
        pixels=pixels,
        sharing=task.policy.sharing if task.policy else None,
        note=note,
        key=task.key,
        mask=task.sums.mask if task.sums is not None and task.kind in (STATISTICS, TRAIN) else None,
    )


def privacy_note(dp: DpSettings, epsilon: float, delta: float) -> str:
    """Return the ledger's remark on what has been spent, and on what it does not cover."""
    text = f"epsilon={epsilon:.4g} at delta={delta:g} so far ({PATIENT})"
    if uncovered := [name for name in CHANNELS if name not in dp.channels]:
        text += f"; without noise: {', '.join(uncovered)}"
    return f"{text}; SEEDED noise protects nobody" if dp.noise == "seeded" else text


app = build_client_app()
