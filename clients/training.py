"""One local round: Adam over the site's slices from the received weights, reproducible from seed, round and site."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from clients.cuda_graph import Replay, adam, set_rate
from clients.data.augment import augment
from clients.data.batches import (
    Batch,
    Chosen,
    domain_sizes,
    gather,
    index_batches,
    max_micro_batches,
    steps_of,
)
from clients.data.prefetch import prefetch
from clients.methods import Guidance, Guide, Source, method_class
from clients.methods.partners import Mixer, build_mixer
from clients.out_of_memory import free_memory, unless_out_of_memory
from common.errors import fail
from common.seeding import stream, stream_seed
from common.settings.plan import Plan
from common.wire.payload import Weights

if TYPE_CHECKING:
    from clients.data.store import CaseStore, SliceTable

LOG = logging.getLogger("fedsgcg.site")
MOMENTS: Final = "adam."
LOCAL: Final = "local."
PARTS: Final = "micro_batches"


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
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train the network in place for one round.

    A step that the memory does not hold is cut into parts whose gradients are accumulated, and the
    round starts over: from the received weights, state and guide, with the same random streams. The
    site's log and the figure `micro_batches` say so, and the state makes the site's next round
    begin with that number of parts.

    Args:
        network: Holds the received weights; afterwards the locally trained ones.
        stores: The cases of each hospital whose data the site owns; their training slices are used.
        plan: Method, schedule and augmentation.
        round_number: From 1; places the round in the learning-rate schedule and names the random
            streams.
        guide: Gives the global prototypes, or None.
        device: Where to compute.
        amplitudes: Amplitudes of other sites, for `method.ram.sharing=summary` and `bank`.
        state: What `train_round` returned in the site's last round; None starts fresh.

    Returns:
        Figures of the round: examples (training slices), steps, seconds, learning_rate (of the
        first step), micro_batches, and the mean over the steps of the loss and of its parts. And
        the state that stays at the site.

    Raises:
        FedsgcgError: TRN-302 without a training slice, TRN-301 when the loss or a trained weight is
            not finite, SITE-502 when the memory does not hold a step in the smallest parts.
    """
    began = time.perf_counter()
    tables, names = [store.slices("train") for store in stores], [store.site for store in stores]
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
        batches = round_batches(tables, plan, round_number, names, device, mixer)
        session = Session(network, plan, len(stores), device, state)
        # A guide may follow the batches: one that has seen those of an abandoned round is no longer
        # the round's.
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
    if parts > plan.site.micro_batches:
        kept |= {PARTS: torch.tensor(parts)}
    return figures | {
        "examples": float(sum(len(table) for table in tables)),
        "learning_rate": learning_rate(plan, round_number, 0.0),
        "micro_batches": float(parts),
        "seconds": time.perf_counter() - began,
    }, kept


def _more_parts(parts: int, most: int, plan: Plan, round_number: int, device: torch.device) -> int:
    """Twice as many parts of a step, as far as that goes, told to the site's log.

    Raises:
        FedsgcgError: SITE-502 when the step was in its smallest parts already.
    """
    size, side = plan.method.batch_size, plan.data.image_size
    if parts >= most:
        raise fail(
            "SITE-502",
            found=f"a step of {size} slices of {side} pixels in {parts} parts that {device.type} memory does not hold",
            expected="a step that fits in the smallest parts: two slices, and one of each source domain",
            action="lower data.image_size or network.base_width, let fewer runs share the device, or take one with "
            "more memory",
        )
    parts = min(2 * parts, most)
    LOG.warning(
        "round %d: a step of %d slices does not fit into the memory (%s); the round starts over with each step in %d "
        "parts, the same effective batch (BatchNorm and Dice see the parts)",
        *(round_number, size, device.type, parts),
    )
    return parts


class Session:
    """Method and optimiser of one round.

    Args:
        network: Trained in place.
        plan: Method and schedule.
        domains: D, hospitals whose data the client owns.
        device: Where to compute.
        state: As `state()` returned it after the client's last round; missing parts start fresh.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        domains: int,
        device: torch.device,
        state: Mapping[str, Tensor],
    ) -> None:
        network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._plan, self._device = plan, device
        self.method: Source = method_class(plan.method)(network, plan, domains, device)
        self.method.local.train()
        self._optimizer = adam(
            self.method.groups(), plan.method.learning_rate, plan.method.weight_decay, device
        )
        self._replay = Replay(self._work, self._clear, device)
        self._guide: Guide | None = None
        self._restore(state)

    def train(
        self,
        batches: Iterator[Batch],
        steps: int,
        guide: Guide | None,
        round_number: int,
        micro_batches: int,
    ) -> dict[str, float]:
        """Take one step a batch.

        Returns:
            Number of steps, and the mean over them of the loss and of its parts.

        Raises:
            FedsgcgError: TRN-301 when the loss or a trained weight is not finite.
        """
        names = ("loss", *self.method.parts)
        on_cpu = self._device.type == "cpu"
        sums = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        for step, batch in enumerate(batches):
            set_rate(self._optimizer, learning_rate(self._plan, round_number, step / steps))
            found = self.step(batch, guide, micro_batches)
            sums += found
            if on_cpu and not math.isfinite(found[0].item()):
                raise _diverged(round_number, step)
        return self._figures(names, sums, steps, round_number)

    def step(self, batch: Batch, guide: Guide | None, micro_batches: int = 1) -> Tensor:
        """Take one step; returns the loss and its parts, detached, in the order of `method.parts`."""
        if (
            guide is not self._guide
        ):  # a captured step holds the prototypes that it was captured with
            self._guide, self._replay = guide, Replay(self._work, self._clear, self._device)
        if isinstance(guide, Guidance | None):
            self._cut = batch.sizes, micro_batches
            tensors = [batch.images, batch.labels, *([] if batch.mixed is None else [batch.mixed])]
            return self._replay(*tensors, key=self._cut)
        return self._train(
            batch, micro_batches
        )  # a guide that changes within the round cannot be captured

    def _work(self, images: Tensor, labels: Tensor, mixed: Tensor | None = None) -> Tensor:
        sizes, micro_batches = self._cut
        return self._train(Batch(images, labels, sizes, mixed), micro_batches)

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
        self._optimizer.step()
        return torch.stack(found).sum(0)

    def _clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What stays at the site: local networks always, Adam's moments with `federation.moments=keep`."""
        tensors = {
            f"{LOCAL}{name}": tensor for name, tensor in self.method.local.state_dict().items()
        }
        if self._plan.federation.moments == "keep":
            for index, moments in self._optimizer.state_dict()["state"].items():
                tensors |= {f"{MOMENTS}{index}.{name}": tensor for name, tensor in moments.items()}
        return tensors

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        if local := {
            name.removeprefix(LOCAL): tensor
            for name, tensor in state.items()
            if name.startswith(LOCAL)
        }:
            self.method.local.load_state_dict(local)
        trained = [
            parameter for group in self._optimizer.param_groups for parameter in group["params"]
        ]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith(MOMENTS):
                index, _, kind = name.removeprefix(MOMENTS).partition(".")
                like = trained[int(index)]
                # The fused kernel walks through memory: moments must lie as their parameter does,
                # channels last. And it counts its steps in place: what was given stays as it was,
                # for a round that starts over.
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
        """Read the sums once at the end: on a GPU this is the only wait of the round; NaN and Inf survive any sum."""
        weights = self.method.network.state_dict().values()
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in weights]).all()
        values = (sums / steps).tolist()
        if not (bool(finite) and all(math.isfinite(value) for value in values)):
            raise _diverged(round_number, steps)
        return dict(zip(names, values, strict=True)) | {"steps": float(steps)}


def learning_rate(plan: Plan, round_number: int, share: float) -> float:
    """Adam's rate at a point of the run: lr0 * (1 - progress) ** power, progress over all rounds (methods.md 2.6).

    Args:
        plan: Gives lr0, the power and the number of rounds.
        round_number: From 1.
        share: Share of the round that is done, in [0, 1].
    """
    progress = (round_number - 1 + share) / plan.federation.rounds
    return float(plan.method.learning_rate * max(0.0, 1.0 - progress) ** plan.method.poly_power)


def client_name(hospitals: Sequence[str]) -> str:
    """Name of a client's random streams: that of its hospitals, so that one domain is the same pooled or by site."""
    return "+".join(hospitals)


def round_batches(
    tables: Sequence[SliceTable],
    plan: Plan,
    round_number: int,
    names: Sequence[str],
    device: torch.device,
    mixer: Mixer | None = None,
) -> Iterator[Batch]:
    """Yield the augmented batches of a round on the device.

    Args:
        tables: The slices of each source domain.
        plan: Batch sizes, augmentation, seed.
        round_number: Names the random streams.
        names: The hospital of each table, which names the random streams.
        device: Where the batches go.
        mixer: Makes the amplitude-mixed copies; None for methods without.
    """
    generator = torch.Generator(device).manual_seed(
        stream_seed(plan.seed, round_number, client_name(names), "augment")
    )
    rngs = [stream(plan.seed, round_number, name, "batches") for name in names]
    chosen = index_batches(tables, plan.method, rngs)
    for images, labels, sizes, *drawn in prefetch(_read(tables, chosen, mixer), device):
        changed, moved = augment(images, labels, plan.data.augmentation, generator)
        mixed = mixer.mix(changed, *drawn).to(memory_format=torch.channels_last) if mixer else None
        yield Batch(changed.to(memory_format=torch.channels_last), moved, sizes, mixed)


def _read(
    tables: Sequence[SliceTable], batches: Iterable[Chosen], mixer: Mixer | None
) -> Iterator[tuple[Tensor | tuple[int, ...], ...]]:
    """Read the slices of each batch, and what the mixer draws for it, on the CPU."""
    for chosen in batches:
        sizes = tuple(len(numbers) for numbers in chosen)
        yield *gather(tables, chosen), sizes, *(mixer.draw(sizes) if mixer else ())


def load_weights(network: nn.Module, weights: Weights) -> None:
    """Put received weights into the network.

    Raises:
        FedsgcgError: PAY-103 when names or shapes are not the network's own.
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
    """Return the network's state as it travels."""
    return Weights.from_state(
        {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    )


def _diverged(round_number: int, step: int) -> Exception:
    return fail(
        "TRN-301",
        found=f"a loss or weight that is not finite in round {round_number}, step {step}",
        expected="finite numbers",
        action="lower method.learning_rate; nothing of this round leaves the site",
    )
