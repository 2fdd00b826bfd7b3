"""The kernels and the mixing of amplitudes on a GPU, against their torch equivalents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsgcg.clients.methods.amplitude import (
    mix_amplitude,
    mix_window_amplitudes,
    window_amplitudes,
)
from fedsgcg.common.sgcg import loss as sgcg
from fedsgcg.common.sgcg import moments
from fedsgcg.common.sgcg.loss import class_moments, sgcg_loss
from tests.benchmarks import peers
from tests.benchmarks.bench_loss import inputs
from tests.benchmarks.gpu_timing import Sizes, Work, gpu, middle, timed
from tests.benchmarks.harness import ratio, row, show


def run(*, toy: bool = False) -> list[dict[str, Any]]:
    """Measure on the first CUDA device, or with `toy` on the CPU, and return the rows."""
    device, sizes = gpu(toy)
    return show(kernels(device, sizes) + mixing(device, sizes))


def kernels(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Compare the loss and the class moments with their torch and einsum forms."""
    rows = []
    for A, K in ((32, 3), (64, 3)):
        features, labels, mean, covariance = (
            part.to(device) for part in inputs(sizes.pixels, A, K)
        )
        leaf = features.requires_grad_()

        def loss(
            form: Callable[..., Tensor], leaf: Tensor = leaf, rest: Any = (labels, mean, covariance)
        ) -> Work:
            return lambda: torch.autograd.grad(form(leaf, *rest, temperature=0.5), leaf)

        variants = {
            "ours": loss(sgcg_loss),
            "torch": _without_kernels(loss(sgcg_loss)),
            "einsum": loss(peers.einsum_loss),
            "moments": lambda f=features, y=labels, K=K: class_moments(f, y, K),
            "moments torch": _without_kernels(
                lambda f=features, y=labels, K=K: class_moments(f, y, K)
            ),
        }
        times = timed(variants, device, sizes)
        case = f"N={sizes.pixels} A={A} K={K}"
        rows += [
            row("sgcg_loss, GPU", case, "einsum / ours", ratio(times, "einsum", "ours"), "x"),
            row("sgcg_loss, GPU", case, "torch form / ours", ratio(times, "torch", "ours"), "x"),
            row("sgcg_loss, GPU", case, "ours, forward+backward", middle(times, "ours"), "ms"),
            row(
                "class_moments, GPU",
                case,
                "torch form / ours",
                ratio(times, "moments torch", "moments"),
                "x",
            ),
            row("class_moments, GPU", case, "ours", middle(times, "moments"), "ms"),
            *_kernel_errors(leaf, labels, mean, covariance, case),
        ]
    return rows


def _kernel_errors(
    leaf: Tensor, labels: Tensor, mean: Tensor, covariance: Tensor, case: str
) -> list[dict[str, Any]]:
    """Return the relative errors against float64."""
    results = []
    for dtype in (leaf.dtype, torch.float64):
        here = leaf.detach().to(dtype).requires_grad_()
        loss = sgcg_loss(here, labels, mean, covariance, temperature=0.5)
        (gradient,) = torch.autograd.grad(loss, here)
        results.append(
            (loss.detach().double(), gradient.double(), class_moments(here, labels, len(mean))[2])
        )
    (loss, gradient, scatter), (exact, slope, product) = results
    errors = {
        "loss": float(abs(loss - exact) / exact),
        "gradient": float((gradient - slope).norm() / slope.norm()),
        "scatter": float((scatter - product).norm() / product.norm()),
    }
    limits = {"loss": 1e-6, "gradient": 1e-6, "scatter": 1e-6}
    return [
        row(
            "kernels, GPU",
            case,
            f"relative error, {name}",
            error,
            "",
            f"≤ {limits[name]:g}",
            error <= limits[name],
        )
        for name, error in errors.items()
    ]


def _without_kernels(work: Work) -> Work:
    def torch_form() -> None:
        before = sgcg.triton_kernels, moments.triton_kernels
        sgcg.triton_kernels = moments.triton_kernels = lambda *_, **__: False
        try:
            work()
        finally:
            sgcg.triton_kernels, moments.triton_kernels = before

    return torch_form


def mixing(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Compare the mixing of amplitudes with whole Fourier transforms."""
    from tests.benchmarks.bench_amplitude import fft_mix, pictures

    images, partners = (
        pictures(sizes.batch, sizes.side, sizes.side, seed=seed).to(device) for seed in (1, 2)
    )
    share = torch.full((sizes.batch,), 0.3, device=device)
    kept = window_amplitudes(partners)
    variants = {
        "ours": lambda: mix_amplitude(images, partners, share),
        "kept": lambda: mix_window_amplitudes(images, kept, share),
        "fft": lambda: fft_mix(images, partners, share, 0.1),
    }
    times = timed(variants, device, sizes)
    case = f"B={sizes.batch} C=3 {sizes.side} x {sizes.side}"
    gap = float((variants["ours"]() - variants["fft"]()).abs().max())
    part = "mix_amplitude, GPU"
    return [
        row(part, case, "whole FFT / ours", ratio(times, "fft", "ours"), "x"),
        row(part, case, "whole FFT / kept partners", ratio(times, "fft", "kept"), "x"),
        row(part, case, "ours", middle(times, "ours"), "ms"),
        row(part, case, "largest difference from the whole FFT", gap, "", "≤ 2e-6", gap <= 2e-6),
    ]
