"""RAM's amplitude mixing against RAM-DSIR's in NumPy and against a full FFT of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsgcg.clients.methods.amplitude import (
    mix_amplitude,
    mix_window_amplitudes,
    window_amplitudes,
)
from tests.benchmarks.harness import at_least, one_thread, paired, ratio, row, show

B, WINDOW = 8, 0.1
CASES = ((64, 64), (128, 128), (256, 256), (384, 384), (512, 512), (255, 255), (256, 192))
PART = "mix_amplitude"


def run() -> list[dict[str, Any]]:
    """Measure every size and return the rows."""
    with one_thread():
        return show([line for H, W in CASES for line in _case(H, W, judged=(H, W) == (256, 256))])


def pictures(count: int, H: int, W: int, seed: int) -> Tensor:
    """Return (count, 3, H, W) float32 in [-1, 1]: smooth shapes with noise, dark on average."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.nn.functional.interpolate(
        torch.randn(count, 3, 20, 20, generator=generator), size=(H, W), mode="bicubic"
    )
    noise = torch.randn(count, 3, H, W, generator=generator)
    return (0.4 * shapes + 0.1 * noise - 0.3).clamp(-1, 1)


def numpy_mix(
    images: np.ndarray, partners: np.ndarray, shares: np.ndarray, window: float
) -> np.ndarray:
    """Mix as published: complex128 spectra of each image, split into amplitude and phase."""
    H, W = images.shape[-2:]
    b = int(np.floor(min(H, W) * window))
    inside = np.s_[:, H // 2 - b : H // 2 + b + 1, W // 2 - b : W // 2 + b + 1]
    mixed = []
    for image, partner, share in zip(images, partners, shares, strict=True):
        own = np.fft.fft2(image.astype(np.float64), axes=(-2, -1))
        other = np.fft.fft2(partner.astype(np.float64), axes=(-2, -1))
        amplitude = np.fft.fftshift(np.abs(own), axes=(-2, -1))
        target = np.fft.fftshift(np.abs(other), axes=(-2, -1))
        amplitude[inside] = share * amplitude[inside] + (1 - share) * target[inside]
        amplitude = np.fft.ifftshift(amplitude, axes=(-2, -1))
        mixed.append(np.real(np.fft.ifft2(amplitude * np.exp(1j * np.angle(own)), axes=(-2, -1))))
    return np.stack(mixed)


def fft_mix(images: Tensor, partners: Tensor, shares: Tensor, window: float) -> Tensor:
    """Mix the whole batch by torch's real FFT in float32, with the gain applied in the window."""
    H, W = images.shape[-2:]
    b = int(np.floor(min(H, W) * window))
    own, other = torch.fft.rfft2(images), torch.fft.rfft2(partners)
    for rows in (slice(0, b + 1), slice(H - b, H)) if b else (slice(0, 1),):
        mine, theirs = own[..., rows, : b + 1], other[..., rows, : b + 1].abs()
        share = shares[:, None, None, None]
        own[..., rows, : b + 1] = mine * (share + (1 - share) * theirs / mine.abs())
    return torch.fft.irfft2(own, s=(H, W))


def _case(H: int, W: int, judged: bool) -> list[dict[str, Any]]:
    images, partners = pictures(B, H, W, seed=1), pictures(B, H, W, seed=2)
    shares = torch.randint(1, 11, (B,), generator=torch.Generator().manual_seed(3)) / 10
    kept = window_amplitudes(partners, WINDOW)
    plain = images.numpy(), partners.numpy(), shares.numpy(), WINDOW
    variants = {
        "numpy": lambda: numpy_mix(*plain),
        "fft": lambda: fft_mix(images, partners, shares, WINDOW),
        "ours": lambda: mix_amplitude(images, partners, shares, WINDOW),
        "kept": lambda: mix_window_amplitudes(images, kept, shares, WINDOW),
    }
    times, case = paired(variants), f"B={B} C=3 {H} x {W}"
    whole, bank = ratio(times, "numpy", "ours"), ratio(times, "numpy", "kept")
    gap = float(np.abs(variants["ours"]().double().numpy() - variants["numpy"]()).max())
    return [
        row(
            PART,
            case,
            "NumPy's form / ours",
            whole,
            "x",
            *(("≥ 15x", at_least(whole, 15)) if judged else ()),
        ),
        row(
            PART,
            case,
            "NumPy's form / kept partners",
            bank,
            "x",
            *(("≥ 25x", at_least(bank, 25)) if judged else ()),
        ),
        row(
            PART,
            case,
            "whole FFT / ours",
            fft := ratio(times, "fft", "ours"),
            "x",
            "≥ 1x",
            at_least(fft, 1),
        ),
        row(PART, case, "largest difference from float64", gap, "", "≤ 2e-6", gap <= 2e-6),
        row(
            PART, case, "ours", ratio({**times, "1": [1.0] * len(times["ours"])}, "ours", "1"), "ms"
        ),
    ]
