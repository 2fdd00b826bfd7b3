"""Trains a round with DP-SGD on patient level (Abadi et al., CCS 2016; McMahan et al., ICLR 2018).

A step draws every patient with the same probability, computes the gradient of the method's loss for
each drawn patient alone (over several of its slices), shortens it to `privacy.dp.clip`, adds the
gradients and Gaussian noise, and takes Adam's step with the sum. Adding or removing a patient moves
the sum by at most `clip`. The sum is not divided by the number of patients, which is private; Adam
does not depend on the scale of its gradient.

Opacus computes gradients of single slices inside a batch. Here a patient's slices share one
gradient, and neither the Dice loss nor the mean over the pixels of the SgCG loss is a sum over
slices, so each patient has a backward pass of its own. The accountant is the one for all releases.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsgcg.clients.cuda_graph import set_rate
from fedsgcg.clients.data.augment import augment_batch
from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods import Guide
from fedsgcg.clients.methods.private_statistics import patients_of
from fedsgcg.clients.training import Session, client_name, learning_rate
from fedsgcg.common.errors import fail
from fedsgcg.common.seeding import stream_seed
from fedsgcg.common.settings.dp_rules import steps_of_round
from fedsgcg.common.settings.plan import Plan

if TYPE_CHECKING:
    from fedsgcg.clients.data.store import CaseStore, SliceTable
    from fedsgcg.common.differential_privacy.noise import Noise


def train_private_round(
    network: nn.Module,
    stores: Sequence[CaseStore],
    plan: Plan,
    *,
    round_number: int,
    guide: Guide | None,
    device: torch.device,
    noise: Noise,
    state: dict[str, Tensor] | None = None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train the network in place for one round with noise that hides every single patient.

    Args:
        network: Holds the received weights and, afterwards, the locally trained ones.
        stores: The cases of each of the site's hospitals; their training slices are used.
        plan: Method, schedule, `privacy.dp`.
        round_number: From 1; determines the learning rate.
        guide: Provides the global prototypes, or None.
        device: Device of the training.
        noise: Source of the noise and of the choice of patients and slices.
        state: What was returned in the site's last round; None starts fresh.

    Returns:
        Metrics that do not depend on the images (examples, steps, seconds, learning_rate,
        micro_batches); the loss does and is left out. Second, the state that stays at the site.

    Raises:
        FedsgcgError: TRN-302 without a training slice, TRN-301 when a weight is not finite.
    """
    start = time.perf_counter()
    tables = [store.slices("train") for store in stores]
    patients = list(patients_of(stores, tables))
    if not patients:
        raise fail("TRN-302", found="no training patient", expected="one or more")
    name = client_name([store.site for store in stores])
    seed = stream_seed(plan.seed, round_number, name, "augment")
    augmenting = torch.Generator(device).manual_seed(seed)
    session = PrivateSession(network, plan, device, state or {}, guide, noise)
    steps = steps_of_round(plan)
    session.method.round_number = round_number
    for step in range(steps):
        rate = learning_rate(plan, round_number, step / steps)
        session.private_step(_drawn(patients, plan, noise, augmenting, device), rate)
    session.require_finite(round_number)
    return {
        "examples": float(sum(len(table) for table in tables)),
        "steps": float(steps),
        "learning_rate": learning_rate(plan, round_number, 0.0),
        "micro_batches": 1.0,
        "seconds": time.perf_counter() - start,
    }, session.state()


class PrivateSession(Session):
    """Method and optimiser of one round whose steps hide single patients.

    Args:
        network: Trained in place.
        plan: Method, schedule, `privacy.dp`.
        device: Device of the training.
        state: What `state()` returned after the client's last round.
        guide: The prototypes, constant during the round.
        noise: Source of the noise.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        device: torch.device,
        state: dict[str, Tensor],
        guide: Guide | None,
        noise: Noise,
    ) -> None:
        super().__init__(network, plan, 1, device, state)
        self._noise = noise
        self._private_guide = guide
        self._trained = [
            parameter
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def private_step(self, patients: Iterator[Batch], rate: float) -> None:
        """Take one step with the slices of the drawn patients; without any it is noise alone."""
        clip = self._plan.privacy.dp.clip
        total = torch.zeros(sum(each.numel() for each in self._trained), dtype=torch.float64)
        for batch in patients:
            total += clipped(self.patient_gradient(batch), clip)
        std = clip * self._plan.privacy.dp.weights_noise
        noisy = torch.from_numpy(self._noise.rounded(total.numpy(), std))
        start = 0
        for parameter in self._trained:
            part = noisy[start : start + parameter.numel()].reshape(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(part)
            start += parameter.numel()
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        self._steps += 1

    def patient_gradient(self, batch: Batch) -> Tensor:
        """Return the gradient (N,) float64 of the loss of one patient's slices, on the CPU."""
        self._clear()
        value, _ = self.method.loss(batch, self._private_guide)
        value.backward()  # type: ignore[no-untyped-call]
        parts = [
            torch.zeros_like(each) if each.grad is None else each.grad for each in self._trained
        ]
        return torch.cat([part.reshape(-1) for part in parts]).double().cpu()

    def require_finite(self, round_number: int) -> None:
        """Check the trained weights; raises TRN-301."""
        if not all(bool(torch.isfinite(each).all()) for each in self._trained):
            raise fail(
                "TRN-301",
                found=f"a non-finite weight in round {round_number}",
                expected="finite numbers",
                action="lower method.learning_rate; nothing of this round leaves the site",
            )


def clipped(gradient: Tensor, most: float) -> Tensor:
    """Return a gradient (N,) of at most a length; one that is not finite becomes zero."""
    if not bool(torch.isfinite(gradient).all()):
        return torch.zeros_like(gradient)
    length = float(torch.linalg.vector_norm(gradient))
    return gradient if length <= most else gradient * (most / length * (1 - 1e-12))


def _drawn(
    patients: Sequence[tuple[SliceTable, NDArray[np.int64]]],
    plan: Plan,
    noise: Noise,
    augmenting: torch.Generator,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield some augmented slices of each patient that is drawn for a step."""
    rate, most = plan.privacy.dp.sampling_rate, plan.privacy.dp.slices_per_patient
    taken = noise.uniforms(len(patients)) <= rate
    for chosen in np.flatnonzero(taken):
        table, slices = patients[int(chosen)]
        order = np.argsort(noise.uniforms(len(slices)))[:most]
        images, labels = table.stack(slices[order])
        changed, moved = augment_batch(
            torch.from_numpy(images).to(device),
            torch.from_numpy(labels).long().to(device),
            plan,
            augmenting,
        )
        changed = changed.to(memory_format=torch.channels_last)
        yield Batch(changed, moved, (len(order),))
