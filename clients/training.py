"""One local round: Adam over the site's slices from the received weights, reproducible from seed, round and site."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from clients.batches import Batch, Chosen, augment, gather, index_batches, steps_of
from clients.methods import METHODS, Guidance, Guide, Source
from clients.mixing import Mixer, build_mixer
from clients.prefetch import prefetch
from clients.replay import Replay, adam, set_rate
from common.errors import fail
from common.networks import UNet
from common.payload import Weights
from common.plan import Plan
from common.seeding import stream, stream_seed

if TYPE_CHECKING:
    from clients.cases import CaseStore, SliceTable

MOMENTS: Final = "adam."
LOCAL: Final = "local."


def train_round(
    network: UNet,
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

    A step that does not fit into the GPU's memory is cut into parts whose gradients are accumulated, and the round
    starts over from the received weights; the figure `micro_batches` says so.

    Args:
        network: Holds the received weights; afterwards the locally trained ones.
        stores: The cases of each hospital whose data the site owns; their training slices are used.
        plan: Method, schedule and augmentation.
        round_number: From 1; places the round in the learning-rate schedule and names the random streams.
        guide: Gives the global prototypes, or None.
        device: Where to compute.
        amplitudes: Amplitudes of other sites, for `method.ram.sharing=summary` and `bank`.
        state: What `train_round` returned in the site's last round; None starts fresh.

    Returns:
        Figures of the round: examples (training slices), steps, seconds, learning_rate (of the first step),
        micro_batches, and the mean over the steps of the loss and of its parts. And the state that stays at the site.

    Raises:
        FedsgcgError: TRN-302 without a training slice, TRN-301 when the loss or a trained weight is not finite,
            SITE-502 when the memory does not hold even the smallest part of a step.
    """
    began = time.perf_counter()
    tables, names = [store.slices("train") for store in stores], [store.site for store in stores]
    received = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    micro_batches = plan.site.micro_batches
    while True:
        try:
            mixer = build_mixer(tables, plan, client_name(names), round_number, amplitudes, device)
            batches = round_batches(tables, plan, round_number, names, device, mixer)
            session = Session(network, plan, len(stores), device, state or {})
            figures = session.train(batches, steps_of(tables, plan.method), guide, round_number, micro_batches)
            break
        except torch.OutOfMemoryError as error:
            micro_batches *= 2
            if micro_batches > plan.method.batch_size // 2:
                raise _out_of_memory(plan) from error
            torch.cuda.empty_cache()
            network.load_state_dict(received)
    return figures | {
        "examples": float(sum(len(table) for table in tables)),
        "learning_rate": learning_rate(plan, round_number, 0.0),
        "micro_batches": float(micro_batches),
        "seconds": time.perf_counter() - began,
    }, session.state()


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
        self, network: UNet, plan: Plan, domains: int, device: torch.device, state: Mapping[str, Tensor]
    ) -> None:
        network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._plan, self._device = plan, device
        self.method: Source = METHODS[plan.method.name](network, plan, domains, device)
        self.method.local.train()
        self._optimizer = adam(self.method.groups(), plan.method.learning_rate, plan.method.weight_decay, device)
        self._replay = Replay(self._work, self._clear, device)
        self._guide: Guide | None = None
        self._restore(state)

    def train(
        self, batches: Iterator[Batch], steps: int, guide: Guide | None, round_number: int, micro_batches: int
    ) -> dict[str, float]:
        """Take one step a batch.

        Returns:
            Number of steps, and the mean over them of the loss and of its parts.

        Raises:
            FedsgcgError: TRN-301 when the loss or a trained weight is not finite.
        """
        names = ("loss", *self.method.parts)
        on_cpu = self._device.type == "cpu"
        sums = torch.zeros(len(names), dtype=torch.float64 if on_cpu else torch.float32, device=self._device)
        for step, batch in enumerate(batches):
            set_rate(self._optimizer, learning_rate(self._plan, round_number, step / steps))
            found = self.step(batch, guide, micro_batches)
            sums += found
            if on_cpu and not math.isfinite(found[0].item()):
                raise _diverged(round_number, step)
        return self._figures(names, sums, steps, round_number)

    def step(self, batch: Batch, guide: Guide | None, micro_batches: int = 1) -> Tensor:
        """Take one step; returns the loss and its parts, detached, in the order of `method.parts`."""
        if guide is not self._guide:  # a captured step holds the prototypes that it was captured with
            self._guide, self._replay = guide, Replay(self._work, self._clear, self._device)
        if isinstance(guide, Guidance | None):
            self._cut = batch.sizes, micro_batches
            tensors = [batch.images, batch.labels, *([] if batch.mixed is None else [batch.mixed])]
            return self._replay(*tensors, key=self._cut)
        return self._train(batch, micro_batches)  # a guide that changes within the round cannot be captured

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
            values = torch.stack([total.detach(), *(parts.get(name, zero).detach() for name in self.method.parts)])
            found.append(values if share == 1 else share * values)
        self._optimizer.step()
        return torch.stack(found).sum(0)

    def _clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What stays at the site: local networks always, Adam's moments with `federation.moments=keep`."""
        tensors = {f"{LOCAL}{name}": tensor for name, tensor in self.method.local.state_dict().items()}
        if self._plan.federation.moments == "keep":
            for index, moments in self._optimizer.state_dict()["state"].items():
                tensors |= {f"{MOMENTS}{index}.{name}": tensor for name, tensor in moments.items()}
        return tensors

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        if local := {name.removeprefix(LOCAL): tensor for name, tensor in state.items() if name.startswith(LOCAL)}:
            self.method.local.load_state_dict(local)
        trained = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith(MOMENTS):
                index, _, kind = name.removeprefix(MOMENTS).partition(".")
                like = trained[int(index)]
                # The fused kernel walks through memory: moments must lie as their parameter does, channels last.
                moment = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
                moments.setdefault(int(index), {})[kind] = moment
        if moments and self._plan.federation.moments == "keep":
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})

    def _figures(self, names: Sequence[str], sums: Tensor, steps: int, round_number: int) -> dict[str, float]:
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
    generator = torch.Generator(device).manual_seed(stream_seed(plan.seed, round_number, client_name(names), "augment"))
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
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise fail(
            "PAY-103", found=f"{len(wrong)} entries differ, first {wrong[0]!r}", expected="the network of the plan"
        )
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in given.items()})


def weights_of(network: nn.Module) -> Weights:
    """Return the network's state as it travels."""
    return Weights.from_state({name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()})


def _diverged(round_number: int, step: int) -> Exception:
    return fail(
        "TRN-301",
        found=f"a loss or weight that is not finite in round {round_number}, step {step}",
        expected="finite numbers",
        action="lower method.learning_rate; nothing of this round leaves the site",
    )


def _out_of_memory(plan: Plan) -> Exception:
    return fail(
        "SITE-502",
        found=f"a batch of {plan.method.batch_size} slices of {plan.data.image_size} pixels, in parts of two",
        expected="a step that fits into the memory of the GPU",
        action="lower data.image_size or network.base_width, or take a GPU with more memory",
    )
