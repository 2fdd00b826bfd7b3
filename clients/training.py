"""One local round: Adam over the site's slices from the received weights, reproducible from seed, round and site."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clients.batches import augment, batches, steps_of
from clients.device import arithmetic, precision
from clients.methods import METHODS, Guidance
from common.errors import fail
from common.payload import Weights
from common.plan import Plan
from common.seeding import stream, stream_seed

if TYPE_CHECKING:
    from clients.cases import CaseStore, SliceTable

PARTS = ("loss", "loss_supervised", "loss_contrast")


def train_round(
    network: nn.Module,
    store: CaseStore,
    plan: Plan,
    *,
    site: str,
    round_number: int,
    guidance: Guidance | None,
    device: torch.device,
) -> dict[str, float]:
    """Train the network in place for one round.

    Args:
        network: Holds the received weights; afterwards the locally trained ones.
        store: The site's cases; its training slices are used.
        plan: Method, schedule and augmentation.
        site: Name of the site, which names its random streams.
        round_number: From 1; places the round in the learning-rate schedule and names the random streams.
        guidance: Global prototypes, or None.
        device: Where to compute.

    Returns:
        Figures of the round: examples (training slices), steps, seconds, learning_rate (of the first step), and the
        mean over the steps of loss, loss_supervised and loss_contrast.

    Raises:
        FedsgcgError: TRN-302 without a training slice, TRN-301 when the loss or a trained weight is not finite.
    """
    began = time.perf_counter()
    table = store.slices("train")
    if len(table) == 0:
        raise fail("TRN-302", where=site, found="no slice in the training split", expected="one or more")
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    steps = steps_of(table, plan.method)
    optimizer = torch.optim.Adam(network.parameters(), weight_decay=plan.method.weight_decay, fused=True)
    sums = torch.zeros(len(PARTS), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dtype = precision(plan.method, device)
    for step, (images, labels) in enumerate(round_batches(table, plan, round_number, site, device)):
        set_learning_rate(optimizer, plan, round_number, step / steps)
        with arithmetic(dtype, device):
            logits, penultimate = network(images)
        total, parts = METHODS[plan.method.name](logits.float(), penultimate, labels, guidance, plan)
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        sums += torch.stack([total.detach(), *(parts[name] for name in PARTS[1:])])
        if device.type == "cpu" and not math.isfinite(total.item()):
            raise _diverged(site, round_number, step)
    return _figures(network, sums, steps, site, round_number) | {
        "examples": float(len(table)),
        "learning_rate": learning_rate(plan, round_number, 0.0),
        "seconds": time.perf_counter() - began,
    }


def learning_rate(plan: Plan, round_number: int, share: float) -> float:
    """Adam's rate at a point of the run: lr0 * (1 - progress) ** power, progress over all rounds (methods.md 2.6).

    Args:
        plan: Gives lr0, the power and the number of rounds.
        round_number: From 1.
        share: Share of the round that is done, in [0, 1].
    """
    progress = (round_number - 1 + share) / plan.federation.rounds
    return float(plan.method.learning_rate * max(0.0, 1.0 - progress) ** plan.method.poly_power)


def set_learning_rate(optimizer: torch.optim.Optimizer, plan: Plan, round_number: int, share: float) -> None:
    """Give the optimiser the rate of this point of the run."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(plan, round_number, share)


def round_batches(
    table: SliceTable, plan: Plan, round_number: int, site: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented batches of a round on the device: images (B, C, S, S), labels (B, S, S)."""
    generator = torch.Generator(device).manual_seed(stream_seed(plan.seed, round_number, site, "augment"))
    rng = stream(plan.seed, round_number, site, "batches")
    for images, labels in batches(table, plan.method, rng):
        changed, moved = augment(images.to(device), labels.to(device), plan.data.augmentation, generator)
        yield changed.to(memory_format=torch.channels_last), moved


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


def _figures(network: nn.Module, sums: Tensor, steps: int, site: str, round_number: int) -> dict[str, float]:
    """Read the sums once at the end: on a GPU this is the only wait of the round; NaN and Inf survive any sum."""
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in network.state_dict().values()]).all()
    values = (sums / steps).tolist()
    if not (bool(finite) and all(math.isfinite(value) for value in values)):
        raise _diverged(site, round_number, steps)
    return dict(zip(PARTS, values, strict=True)) | {"steps": float(steps)}


def _diverged(site: str, round_number: int, step: int) -> Exception:
    return fail(
        "TRN-301",
        where=site,
        found=f"a loss or weight that is not finite in round {round_number}, step {step}",
        expected="finite numbers",
        action="lower method.learning_rate; nothing of this round leaves the site",
    )
