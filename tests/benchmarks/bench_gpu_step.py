"""The training step on a GPU against an eager float32 loop, and the shares of its parts.

eager    an ordinary float32 loop: NCHW, separate kernel launches, Adam without fusion, a plain
         copy of each batch, and the loss read after each step
ours     as in fedsgcg: bf16 if supported, channels-last, captured steps, prefetched batches,
         mixing and augmentation on the device
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsgcg.clients.cuda_graph import Replay, adam, set_rate
from fedsgcg.clients.data.augment import augment
from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.data.prefetch import prefetch
from fedsgcg.clients.methods import METHODS, Guidance
from fedsgcg.clients.methods.amplitude import mix_window_amplitudes, window_amplitudes
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from tests.benchmarks.bench_step import make_batch
from tests.benchmarks.gpu_timing import Clock, Sizes, Times, gpu, middle, timed
from tests.benchmarks.harness import at_least, ratio, row, show


def run(*, toy: bool = False) -> list[dict[str, Any]]:
    """Measure on the first CUDA device, or with `toy` on the CPU, and return the rows."""
    return show(_steps(*gpu(toy)))


def plan_of(method: str, sizes: Sizes, *overrides: str) -> Plan:
    fixed = [
        f"method={method}",
        f"data.image_size={sizes.side}",
        f"network.base_width={sizes.width}",
        f"method.batch_size={sizes.batch}",
    ]
    return Plan.from_tree(compose([*fixed, *overrides]))


class Loop:
    """A training loop over slices of a memory-mapped file."""

    def __init__(
        self, plan: Plan, device: torch.device, sizes: Sizes, slices: np.ndarray, *, eager: bool
    ) -> None:
        order = torch.contiguous_format if eager else torch.channels_last
        self.device = device
        self.sizes = sizes
        self.plan = plan
        self.slices = slices
        self.order = order
        network = build_network(plan.network, 3, plan.data.out_channels, plan.seed).to(
            device, memory_format=order
        )
        self.method = METHODS[plan.method.name](network.train(), plan, 1, device)
        self.method.local.to(memory_format=order).train()
        images, labels, guidance = make_batch(plan, sizes.side, sizes.batch)
        self.labels, self.partners = labels, window_amplitudes(images.to(device))
        self.guidance = Guidance(
            *(getattr(guidance, name).to(device) for name in ("mean", "covariance", "active"))
        )
        self.eager, self.share = eager, torch.full((sizes.batch,), 0.3, device=device)
        if eager:
            groups = [{**group, "lr": 1e-3} for group in self.method.groups()]
            self.optimizer = torch.optim.Adam(groups, lr=1e-3)
        else:
            self.optimizer = adam(self.method.groups(), 1e-3, 0.0, device)
        self.generator = torch.Generator(device).manual_seed(0)
        self.step = self._step if eager else Replay(self._step, self._clear, device)

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, images: Tensor, labels: Tensor, mixed: Tensor) -> Tensor:
        self._clear()
        with_copy = mixed if self.plan.method.mixes else None
        loss, _ = self.method.loss(Batch(images, labels, (len(images),), with_copy), self.guidance)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Augment and mix a batch on the device."""
        changed, moved = augment(images, labels, self.plan.data.augmentation, self.generator)
        mixed = mix_window_amplitudes(changed, self.partners, self.share).clamp(-1, 1)
        return changed.to(memory_format=self.order), moved, mixed.to(memory_format=self.order)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Read random slices from the file, as a step of an epoch does."""
        rng = np.random.default_rng(0)
        for _ in range(self.sizes.steps):
            chosen = np.sort(rng.integers(0, len(self.slices), self.sizes.batch))
            yield torch.from_numpy(self.slices[chosen]), self.labels

    def once(self) -> float:
        """Train all steps and return the images per second."""
        with Clock(self.device) as clock:
            if self.eager:
                for images, labels in self.batches():
                    self.step(*self.prepare(images.to(self.device), labels.to(self.device))).item()
            else:
                for number, (images, labels) in enumerate(prefetch(self.batches(), self.device)):
                    set_rate(self.optimizer, 1e-3 * (1 - number / self.sizes.steps))
                    self.step(*self.prepare(images, labels))
        return 1e3 * self.sizes.steps * self.sizes.batch / clock.milliseconds


def _steps(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slices.npy"
        shape = (sizes.slices, 3, sizes.side, sizes.side)
        slices = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        slices[:] = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        slices.flush()
        return _step_rows(device, sizes, np.load(path, mmap_mode="r"))


def _step_rows(device: torch.device, sizes: Sizes, slices: np.ndarray) -> list[dict[str, Any]]:
    plan, plain = plan_of("ram_sgcg", sizes), plan_of("ram", sizes)
    single = plan_of("ram_sgcg", sizes, "method.precision=float32")
    loops = {
        "ours": Loop(plan, device, sizes, slices, eager=False),
        "ours without SgCG": Loop(plain, device, sizes, slices, eager=False),
        "eager": Loop(single, device, sizes, slices, eager=True),
    }
    rates: Times = {name: [] for name in loops}
    for loop in loops.values():
        loop.once()
    waits = _waits(loops["ours"], device)
    for _ in range(sizes.repeats):
        for name, loop in loops.items():
            rates[name].append(loop.once())
    ours = loops["ours"]
    fixed = ours.prepare(
        torch.from_numpy(np.array(slices[: sizes.batch])).to(device), ours.labels.to(device)
    )
    without = loops["ours without SgCG"]
    parts = timed(
        {
            "step": lambda: ours.step(*fixed),
            "step without SgCG": lambda: without.step(*fixed),
            "mixing": lambda: mix_window_amplitudes(fixed[0], ours.partners, ours.share).clamp(
                -1, 1
            ),
        },
        device,
        sizes,
    )
    share = tuple(1 - 1 / value for value in ratio(parts, "step", "step without SgCG"))
    mixing = ratio(parts, "mixing", "step")
    part = "training step, GPU"
    case = f"U-Net {sizes.width}, RAM+SgCG, B={sizes.batch}, {sizes.side} x {sizes.side}"
    speed, gain = middle(rates, "ours"), ratio(rates, "ours", "eager")
    return [
        row(part, case, "ours, whole loop", speed, "images/s", "≥ 1500", at_least(speed, 1500)),
        row(part, case, "eager float32 loop", middle(rates, "eager"), "images/s"),
        row(part, case, "ours / eager float32", gain, "x", "≥ 3x", at_least(gain, 3)),
        row(part, case, "ours, the step alone", middle(parts, "step"), "ms"),
        row(part, case, "share of SgCG in the step", share, "", "≤ 0.03", share[0] <= 0.03),
        row(part, case, "mixing, as a share of the step", mixing, "", "≤ 0.02", mixing[0] <= 0.02),
        row(part, case, "host waits in a warm loop", float(waits), "", "0", waits == 0),
    ]


def _waits(loop: Loop, device: torch.device) -> int:
    """Return 1 if the host waits for the device in a warm loop (CUDA's sync debug mode), else 0."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in prefetch(loop.batches(), device):
            loop.step(*loop.prepare(images, labels))
    except RuntimeError as error:
        print(f"a host wait: {error}")
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0
