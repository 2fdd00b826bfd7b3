"""Trains the received model for one local round, reproducibly from seed, round and site."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsgcg.clients.corrections import corrections_of
from fedsgcg.clients.cuda_graph import Replay, adam, set_rate
from fedsgcg.clients.data.augment import augment_batch
from fedsgcg.clients.data.batches import (
    Batch,
    Chosen,
    domain_sizes,
    gather,
    index_batches,
    max_micro_batches,
    steps_of,
)
from fedsgcg.clients.data.pairs import check_pairs, gather_partners, make_pairs, uses_slices
from fedsgcg.clients.data.prefetch import prefetch
from fedsgcg.clients.methods import Guidance, Guide, Source, method_class
from fedsgcg.clients.methods.partners import Mixer, build_mixer
from fedsgcg.clients.out_of_memory import free_memory, unless_out_of_memory
from fedsgcg.common.errors import fail
from fedsgcg.common.seeding import stream, stream_seed
from fedsgcg.common.settings.plan import Plan, Terms
from fedsgcg.common.wire.payload import Weights

if TYPE_CHECKING:
    from fedsgcg.clients.data.store import CaseStore, SliceTable

LOG = logging.getLogger("fedsgcg.site")
MOMENTS: Final = "adam."
LOCAL: Final = "local."
PARTS: Final = "micro_batches"
SUPERVISED: Final = Terms(supervised=True, contrastive=False)


def train_round(
    network: nn.Module,
    stores: Sequence[CaseStore],
    plan: Plan,
    *,
    round_number: int,
    guide: Guide | None,
    device: torch.device,
    amplitudes: bytes = b"",
    state: dict[str, Tensor] | None = None,
    control: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train the network in place for one round.

    If a step runs out of memory, each step is split into more parts whose gradients are
    accumulated, and the round is restarted from the received weights, state and guide with the same
    random streams. This is logged and reported as the metric `micro_batches`. The state makes the
    site's next round start with that number of parts.

    Args:
        network: Holds the received weights and, afterwards, the locally trained ones.
        stores: The cases of each of the site's hospitals; their training slices are used.
        plan: Method, schedule and augmentation.
        round_number: From 1; determines the learning rate and names the random streams.
        guide: Provides the global prototypes, or None.
        device: Device of the training.
        amplitudes: Amplitudes of other sites, for `method.ram.sharing=summary` and `bank`.
        state: What `train_round` returned in the site's last round; None starts fresh.
        control: SCAFFOLD's global control variate by parameter (`clients.corrections`).

    Returns:
        Metrics of the round: examples (training slices), steps, seconds, learning_rate (of the
        first step), micro_batches, and the means over the steps of the loss and its parts. Second,
        the state that stays at the site.

    Raises:
        FedsgcgError: TRN-302 without a training slice, TRN-301 when the loss or a trained weight is
            not finite, TRN-311 for pairs of slices without volumes, ROL-212 for a round without a
            term for images without labels, SITE-502 when a step in its smallest parts runs out of
            memory.
    """
    start = time.perf_counter()
    tables = [store.slices("train") for store in stores]
    names = [store.site for store in stores]
    terms = plan.terms(round_number, labelled=all(store.labelled for store in stores))
    if not any(terms):
        found = f"training in round {round_number}, which has the supervised term alone"
        raise fail("ROL-212", where=client_name(names), found=found)
    check_pairs(stores, plan)
    state = state or {}
    received = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sizes = [
        min(size, len(table))
        for table, size in zip(tables, domain_sizes(plan.method, len(tables)), strict=True)
    ]
    most = max_micro_batches(sizes)
    parts = min(max(plan.site.micro_batches, int(state.get(PARTS, 1))), most)

    def attempt() -> tuple[dict[str, float], dict[str, Tensor]]:
        mixer = build_mixer(stores, plan, client_name(names), round_number, amplitudes, device)
        batches = round_batches(tables, plan, round_number, names, device, mixer, terms)
        rng = stream(plan.seed, round_number, client_name(names), "draws")
        session = Session(network, plan, len(stores), device, state, rng, control)
        # A guide may change with the batches, so each attempt needs its own copy.
        own_guide = copy.copy(guide)
        figures = session.train(
            batches, steps_of(tables, plan.method), own_guide, round_number, parts
        )
        return figures, session.state() | (own_guide.state() if own_guide is not None else {})

    while (trained := unless_out_of_memory(attempt)) is None:
        parts = _more_parts(parts, most, plan, round_number, device)
        free_memory(device)
        network.zero_grad(set_to_none=True)
        network.load_state_dict(received)
    figures, kept = trained
    if plan.method.pairs:  # a term that a round does not have has no value
        absent = {"loss_supervised": not terms.supervised, "loss_contrast": not terms.contrastive}
        figures = {name: value for name, value in figures.items() if not absent.get(name)}
    if parts > plan.site.micro_batches:
        kept |= {PARTS: torch.tensor(parts)}
    return figures | {
        "examples": float(sum(len(table) for table in tables)),
        "learning_rate": learning_rate(plan, round_number, 0.0),
        "micro_batches": float(parts),
        "seconds": time.perf_counter() - start,
    }, kept


def _more_parts(parts: int, most: int, plan: Plan, round_number: int, device: torch.device) -> int:
    """Return twice the number of parts, at most `most`, and log the retry.

    Raises:
        FedsgcgError: SITE-502 when the step already was in its smallest parts.
    """
    size, side = plan.method.batch_size, plan.data.image_size
    if parts >= most:
        raise fail(
            "SITE-502",
            found=f"a step of {size} slices of {side} pixels in {parts} parts does not fit into "
            f"{device.type} memory",
            expected="memory for the smallest part: two slices, and one of each source domain",
            action="lower data.image_size or network.base_width, let fewer runs share the device, "
            "or use a device with more memory",
        )
    parts = min(2 * parts, most)
    LOG.warning(
        "round %d: a step of %d slices does not fit into the memory (%s); the round is restarted "
        "with each step split into %d parts, with the same effective batch "
        "(BatchNorm and Dice are computed per part)",
        *(round_number, size, device.type, parts),
    )
    return parts


class Session:
    """Method and optimiser of one round.

    Args:
        network: Trained in place.
        plan: Method and schedule.
        domains: D, number of the client's source domains.
        device: Device of the training.
        state: What `state()` returned after the client's last round; missing entries start fresh.
        rng: Draws the method's random numbers; by default from the plan's seed.
        control: SCAFFOLD's global control variate by parameter.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        domains: int,
        device: torch.device,
        state: Mapping[str, Tensor],
        rng: np.random.Generator | None = None,
        control: Mapping[str, Tensor] | None = None,
    ) -> None:
        network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._plan, self._device = plan, device
        self._rng = rng or stream(plan.seed, "draws")
        self.method: Source = method_class(plan.method)(network, plan, domains, device)
        self.method.local.train()
        self._optimizer = adam(
            self.method.groups(), plan.method.learning_rate, plan.method.weight_decay, device
        )
        self._replay = Replay(self._work, self._clear, device)
        self._guide: Guide | None = None
        self._corrections = corrections_of(network, plan, state, control or {})
        self._steps = 0
        self._restore(state)

    def train(
        self,
        batches: Iterator[Batch],
        steps: int,
        guide: Guide | None,
        round_number: int,
        micro_batches: int,
    ) -> dict[str, float]:
        """Take one step per batch.

        Returns:
            The number of steps, and the means over them of the loss and its parts.

        Raises:
            FedsgcgError: TRN-301 when the loss or a trained weight is not finite.
        """
        names = ("loss", *self.method.parts)
        on_cpu = self._device.type == "cpu"
        self.method.round_number = round_number
        sums = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        found_first: dict[str, float] = {}
        for step, batch in enumerate(batches):
            if step == 0:
                (_, first), *_ = batch.parts(micro_batches)
                found_first = self.method.diagnose(first, copy.copy(guide))
            set_rate(self._optimizer, learning_rate(self._plan, round_number, step / steps))
            found = self.step(batch, guide, micro_batches)
            sums += found
            if on_cpu and not math.isfinite(found[0].item()):
                raise _diverged(round_number, step)
        self.method.finish()
        return self._figures(names, sums, steps, round_number) | found_first

    def step(self, batch: Batch, guide: Guide | None, micro_batches: int = 1) -> Tensor:
        """Take one step; return the detached loss and its parts in the order of `method.parts`."""
        self._steps += 1
        if guide is not self._guide:
            # A captured step keeps using the prototypes it was captured with.
            self._guide = guide
            self._replay = Replay(self._work, self._clear, self._device)
        drawn = (torch.from_numpy(one) for one in self.method.draw(batch.sizes, self._rng))
        batch = replace(
            batch, drawn=tuple(one.to(self._device, non_blocking=True) for one in drawn)
        )
        if self.method.captures and isinstance(guide, Guidance | None):
            extra = {name: getattr(batch, name) for name in ("mixed", "pairs")}
            given = {name: tensor for name, tensor in extra.items() if tensor is not None}
            self._cut = batch.sizes, micro_batches, batch.labelled, tuple(given)
            others = (*given.values(), *batch.drawn)
            return self._replay(batch.images, batch.labels, *others, key=self._cut)
        # A guide that changes during the round cannot be captured.
        return self._train(batch, micro_batches)

    def _work(self, images: Tensor, labels: Tensor, *others: Tensor) -> Tensor:
        sizes, micro_batches, labelled, names = self._cut
        extra = dict(zip(names, others, strict=False))
        drawn = others[len(names) :]
        batch = Batch(images, labels, sizes, **extra, labelled=labelled, drawn=drawn)
        return self._train(batch, micro_batches)

    def _train(self, batch: Batch, micro_batches: int) -> Tensor:
        self._clear()
        found: list[Tensor] = []
        for share, part in batch.parts(micro_batches):
            total, parts = self.method.loss(part, self._guide)
            (total if share == 1 else share * total).backward()  # type: ignore[no-untyped-call]
            zero = torch.zeros_like(total)
            values = torch.stack(
                [total.detach(), *(parts.get(name, zero).detach() for name in self.method.parts)]
            )
            found.append(values if share == 1 else share * values)
        for correction in self._corrections:
            correction.apply()
        self._optimizer.step()
        return torch.stack(found).sum(0)

    def _clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return what stays at the site: local networks, control variates, kept Adam moments."""
        tensors = {
            f"{LOCAL}{name}": tensor for name, tensor in self.method.local.state_dict().items()
        }
        if self._plan.federation.moments == "keep":
            for index, moments in self._optimizer.state_dict()["state"].items():
                tensors |= {f"{MOMENTS}{index}.{name}": tensor for name, tensor in moments.items()}
        for correction in self._corrections:
            tensors |= correction.state(self._steps)
        return tensors

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        local = {
            name.removeprefix(LOCAL): tensor
            for name, tensor in state.items()
            if name.startswith(LOCAL)
        }
        if local:
            self.method.local.load_state_dict(local)
        trained = [
            parameter for group in self._optimizer.param_groups for parameter in group["params"]
        ]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith(MOMENTS):
                index, _, kind = name.removeprefix(MOMENTS).partition(".")
                like = trained[int(index)]
                # The fused kernel needs moments in their parameter's memory format, channels last.
                # It also counts steps in place, so the tensors are copied to keep `state` intact
                # for a restart.
                moment = (
                    torch.empty_like(like).copy_(tensor)
                    if tensor.shape == like.shape
                    else tensor.clone()
                )
                moments.setdefault(int(index), {})[kind] = moment
        if moments and self._plan.federation.moments == "keep":
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})

    def _figures(
        self, names: Sequence[str], sums: Tensor, steps: int, round_number: int
    ) -> dict[str, float]:
        """Return the mean losses and the number of steps; check that all values are finite.

        Reading the sums once at the end is the only synchronisation of the round on a GPU. A NaN or
        Inf of any step is still visible in the sums.
        """
        weights = self.method.network.state_dict().values()
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in weights]).all()
        values = (sums / steps).tolist()
        if not (bool(finite) and all(math.isfinite(value) for value in values)):
            raise _diverged(round_number, steps)
        return dict(zip(names, values, strict=True)) | {"steps": float(steps)}


def learning_rate(plan: Plan, round_number: int, share: float) -> float:
    """Return the learning rate lr0 * (1 - progress) ** power at a point of the run.

    Progress counts over all rounds. See "Loss" in docs/explanation/ram-dsir.md.

    Args:
        plan: Provides lr0, the power and the number of rounds.
        round_number: From 1.
        share: Completed share of the round, in [0, 1].
    """
    progress = (round_number - 1 + share) / plan.federation.rounds
    return float(plan.method.learning_rate * max(0.0, 1.0 - progress) ** plan.method.poly_power)


def client_name(hospitals: Sequence[str]) -> str:
    """Return the name of a client's random streams, made of its hospitals' names.

    A single domain thus has the same streams with pooled data and by site.
    """
    return "+".join(hospitals)


def round_batches(
    tables: Sequence[SliceTable],
    plan: Plan,
    round_number: int,
    names: Sequence[str],
    device: torch.device,
    mixer: Mixer | None = None,
    terms: Terms = SUPERVISED,
) -> Iterator[Batch]:
    """Yield the augmented batches of a round on the device.

    Args:
        tables: The slices of each source domain.
        plan: Batch sizes, augmentation, seed.
        round_number: Names the random streams.
        names: The hospital of each table; names the random streams.
        device: Device of the batches.
        mixer: Makes the amplitude-mixed copies; None for methods that use none.
        terms: The terms of the loss; the contrastive one needs pairs.
    """
    client = client_name(names)
    generator, views = (
        torch.Generator(device).manual_seed(stream_seed(plan.seed, round_number, client, use))
        for use in ("augment", "contrast views")
    )
    chosen = _chosen(tables, plan, round_number, names)
    rng = stream(plan.seed, round_number, client, "pairs")
    draw = _partners(tables, plan, rng) if terms.contrastive and uses_slices(plan) else None
    for images, labels, sizes, *drawn in prefetch(_read(tables, chosen, mixer, draw), device):
        pairs = None
        if terms.contrastive:
            partners = drawn.pop() if draw else None
            pairs = make_pairs(images, partners, plan.method.segclr, views)
        changed, moved = augment_batch(images, labels, plan, generator)
        mixed = mixer.mix(changed, *drawn).to(memory_format=torch.channels_last) if mixer else None
        changed = changed.to(memory_format=torch.channels_last)
        yield Batch(changed, moved, sizes, mixed, pairs, terms.supervised)


def _partners(
    tables: Sequence[SliceTable], plan: Plan, rng: np.random.Generator
) -> Callable[[Chosen], Tensor]:
    """Return a function that reads the other slice of each pair."""
    distance = plan.method.segclr.slice_distance
    return lambda chosen: gather_partners(tables, chosen, distance, rng)


def round_slices(
    tables: Sequence[SliceTable], plan: Plan, round_number: int, names: Sequence[str]
) -> list[NDArray[np.int64]]:
    """Return the distinct slices of each source domain that `round_batches` uses in a round."""
    used: list[set[int]] = [set() for _ in tables]
    for chosen in _chosen(tables, plan, round_number, names):
        for seen, numbers in zip(used, chosen, strict=True):
            seen.update(numbers.tolist())
    return [np.array(sorted(seen), dtype=np.int64) for seen in used]


def _chosen(
    tables: Sequence[SliceTable], plan: Plan, round_number: int, names: Sequence[str]
) -> Iterator[Chosen]:
    """Yield the slices of each step of a round."""
    rngs = [stream(plan.seed, round_number, name, "batches") for name in names]
    return index_batches(tables, plan.method, rngs)


def _read(
    tables: Sequence[SliceTable],
    batches: Iterable[Chosen],
    mixer: Mixer | None,
    partners: Callable[[Chosen], Tensor] | None,
) -> Iterator[tuple[Tensor | tuple[int, ...], ...]]:
    """Read the slices of each batch on the CPU, and draw its partners for mixing and for pairs."""
    for chosen in batches:
        sizes = tuple(len(numbers) for numbers in chosen)
        mixing = mixer.draw(sizes) if mixer else ()
        yield *gather(tables, chosen), sizes, *mixing, *([partners(chosen)] if partners else [])


def load_weights(network: nn.Module, weights: Weights) -> None:
    """Load received weights into the network.

    Raises:
        FedsgcgError: PAY-103 when names or shapes differ from the network's.
    """
    own, given = network.state_dict(), weights.to_state()
    found = {name: tuple(array.shape) for name, array in given.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if found != expected:
        wrong = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        raise fail(
            "PAY-103",
            found=f"{len(wrong)} entries differ, first {wrong[0]!r}",
            expected="the network of the plan",
        )
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in given.items()})


def weights_of(network: nn.Module) -> Weights:
    """Return the network's state in wire format."""
    return Weights.from_state(
        {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    )


def _diverged(round_number: int, step: int) -> Exception:
    return fail(
        "TRN-301",
        found=f"a non-finite loss or weight in round {round_number}, step {step}",
        expected="finite numbers",
        action="lower method.learning_rate; nothing of this round leaves the site",
    )
