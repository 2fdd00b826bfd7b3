"""RAM: mixes the low-frequency amplitude of an image with a partner's and keeps its phase.

    A' = r * A + (1 - r) * A_partner   inside the window of frequencies up to b rows and columns,
    out = x + Re IDFT_window[(A' - A) * phase]

See "Amplitude mixing" in docs/explanation/ram-dsir.md. Only the window is computed; all other
frequencies of the image stay exactly as they are. The image is real and the window symmetric, so
columns 0 to b suffice, and products of cosines and sines give rows k and -k together without
complex arithmetic. Along the rows of an image (its width) the window's frequencies are computed by
matrix products with a part of the DFT matrix, or by a real FFT of which columns 0 to b are kept.
Along the height, where only those columns are left, matrix products are always used.

`_uses_fft` chooses by device, width and window only, not by a measurement or the processor:
processes that chose differently would differ in the last bits and thus in the model's hash. The
rule follows from the cost per pixel, 2 (b + 1) terms for products and about log2 W for an FFT. The
FFT of the rows takes about half the time of a full 2-D FFT. (At 256 and 384 pixels, products alone
took 1.05 and 1.33 times as long as the full FFT on an AMD EPYC. On an Intel Xeon they took 0.8
times as long, and this choice 0.72 and 0.75 times; it was not measured on AMD.)

Legend: B batch, C channels, H, W height and width, b half window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from fedsgcg.common.sgcg.moments import check_finite, check_shape

WINDOW: Final = 0.1
"""Half window as a share of the shorter side, as in RAM-DSIR."""

FFT_HALF: Final = {"forward": 25, "back": 38}
"""Smallest half window b whose rows are transformed by FFT.

The values are b at 256 and 384 pixels with the published window of 0.1. The inverse needs a wider
window to gain, because its FFT handles the complete half spectrum, which is mostly zeros.
"""


def mix_amplitude(
    images: Tensor, partners: Tensor, ratio: Tensor, window: float = WINDOW
) -> Tensor:
    """Mix every image's low-frequency amplitudes with its partner's.

    Runs on the images' device without synchronising, without gradient, in float32 (float64 for
    float64 images) regardless of autocast and TF32. The caller clips the result to the images'
    range.

    Args:
        images: (B, C, H, W) floats; their phase and all frequencies outside the window are kept.
        partners: (B, C, H, W) floats on the same device.
        ratio: (B,) floats in [0, 1], the share of an image's own amplitude; 1 leaves the image
            unchanged.
        window: Half window b = floor(min(H, W) * window); above 0, at most 0.5 (all frequencies).

    Returns:
        (B, C, H, W), not clipped.

    Raises:
        ValueError: Wrong shapes, types, devices or window. On a CPU also a ratio outside [0, 1] or
            non-finite values; on a GPU, where the check would synchronise, these give a wrong or
            non-finite result.
    """
    _check_images("images", images)
    _check_partner("partners", partners, tuple(images.shape), images.device)
    half = _half_window(images, window)
    return _mix(images, _amplitudes("partners", partners.to(_precision(images)), half), ratio, half)


def window_amplitudes(images: Tensor, window: float = WINDOW) -> Tensor:
    """Compute a partner's amplitudes for `mix_window_amplitudes`.

    Args:
        images: (B, C, H, W) floats.
        window: As in `mix_amplitude`.

    Returns:
        (B, C, 2, b + 1, b + 1): first rows 0 to b, then rows 0 to -b; columns 0 to b. Columns -1 to
        -b follow by symmetry.

    Raises:
        ValueError: As `mix_amplitude`.
    """
    _check_images("images", images)
    return _amplitudes("images", images.to(_precision(images)), _half_window(images, window))


def mix_window_amplitudes(
    images: Tensor, amplitudes: Tensor, ratio: Tensor, window: float = WINDOW
) -> Tensor:
    """Mix like `mix_amplitude`, with precomputed amplitudes of the partners.

    Args:
        images: (B, C, H, W) floats.
        amplitudes: (B, C, 2, b + 1, b + 1) from `window_amplitudes` of images of the same size with
            the same window.
        ratio: (B,) floats in [0, 1], the share of an image's own amplitude.
        window: As in `mix_amplitude`.

    Returns:
        (B, C, H, W), not clipped.

    Raises:
        ValueError: As `mix_amplitude`.
    """
    _check_images("images", images)
    half = _half_window(images, window)
    B, C = images.shape[:2]
    _check_partner("amplitudes", amplitudes, (B, C, 2, half + 1, half + 1), images.device)
    return _mix(images, amplitudes, ratio, half)


def _amplitudes(name: str, images: Tensor, half: int) -> Tensor:
    with torch.no_grad(), _exact_products(images.device):
        amplitudes = torch.hypot(*_spectrum(images, half))
    if images.device.type == "cpu" and not math.isfinite(amplitudes.sum().item()):
        check_finite(**{name: images})
    return amplitudes


def _mix(images: Tensor, amplitudes: Tensor, ratio: Tensor, half: int) -> Tensor:
    _check_ratio(ratio, images.shape[0])
    dtype = _precision(images)
    own = images.to(dtype).contiguous()
    share = ratio.to(own.device, dtype, non_blocking=True).view(-1, 1, 1, 1, 1)
    with torch.no_grad(), _exact_products(images.device):
        change = _change(_spectrum(own, half), amplitudes.to(dtype), share)
        mixed = _add_inverse(own, change, half)
    if images.device.type == "cpu" and not math.isfinite(sum(part.sum().item() for part in change)):
        check_finite(images=images, amplitudes=amplitudes)
    return mixed


class _Transform(NamedTuple):
    """Matrices of the window's DFT and of its weighted inverse.

    `rows` (2(b + 1), H) has the cosines of all frequencies, then the sines. `columns` (W, 2(b + 1))
    has the cosine and the negative sine of each frequency next to each other, like the parts of a
    complex number.
    """

    rows: Tensor
    columns: Tensor
    rows_back: Tensor
    columns_back: Tensor


@lru_cache(maxsize=64)
def _transform(
    height: int, width: int, half: int, dtype: torch.dtype, device: torch.device
) -> _Transform:
    """Build the matrices in float64 on the CPU, once per size, and keep them on the device.

    In the inverse a column counts twice, for itself and for its conjugate, which is not computed.
    The columns at 0 and at half an even width are their own conjugates and count once. Likewise
    rows k and -k coincide at 0 and at half an even height, and count half each.
    """
    down = torch.cat(_waves(half, height))
    cosines, sines = _waves(half, width)
    across = torch.stack([cosines, -sines], 1).flatten(0, 1)
    own_row, own_column = ((2 * torch.arange(half + 1)) % side == 0 for side in (height, width))
    row_weight = torch.where(own_row, 0.5, 1.0).double().repeat(2) / height
    column_weight = torch.where(own_column, 1.0, 2.0).double().repeat_interleave(2) / width
    parts = down, across.T, (down.T * row_weight), across * column_weight[:, None]
    return _Transform(*(part.contiguous().to(device, dtype) for part in parts))


def _waves(half: int, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of 2 pi f t / length for f = 0 to b, each (b + 1, length) float64.

    The angles are reduced to one turn for accuracy.
    """
    steps = torch.arange(half + 1)[:, None] * torch.arange(length)
    turns = steps.remainder(length).double() / length
    return torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)


def _spectrum(images: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return real and imaginary part of the window of the 2-D DFT, each (B, C, 2, b + 1, b + 1).

    With cc the sum of x cos(row) cos(column), cs that of -x cos(row) sin(column) and so on, the
    coefficient of row k is (cc + ss) + i (cs - sc), that of row -k is (cc - ss) + i (cs + sc).
    """
    B, C, H, W = images.shape
    transform = _transform(H, W, half, images.dtype, images.device)
    size = half + 1
    if _uses_fft(images, half, "forward"):
        lines = torch.view_as_real(torch.fft.rfft(images)[..., :size]).reshape(B * C, H, 2 * size)
    else:
        lines = (images.reshape(-1, W) @ transform.columns).view(B * C, H, 2 * size)
    waves = torch.bmm(transform.rows.expand(B * C, -1, -1), lines).view(B, C, 2, size, size, 2)
    (cc, cs), (sc, ss) = (rows.unbind(-1) for rows in waves.unbind(2))
    return torch.stack([cc + ss, cc - ss], 2), torch.stack([cs - sc, cs + sc], 2)


def _change(
    spectrum: tuple[Tensor, Tensor], amplitudes: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what mixing adds to the spectrum: (1 - r) (A_partner - A) along the image's phase.

    An amplitude below the rounding error of the image's largest one (an empty slice) has no
    meaningful phase. It is treated as zero, whose phase is 0, as in RAM-DSIR.
    """
    real, imaginary = spectrum
    own = torch.hypot(real, imaginary)
    silent = own <= torch.finfo(own.dtype).eps * own.amax((-3, -2, -1), keepdim=True)
    change = (1 - share) * (amplitudes - own)
    gain = change / own
    return torch.where(silent, change, real * gain), torch.where(silent, 0.0, imaginary * gain)


def _add_inverse(images: Tensor, change: tuple[Tensor, Tensor], half: int) -> Tensor:
    """Return the images plus the real part of the inverse DFT of a change of the window."""
    B, C, H, W = images.shape
    transform = _transform(H, W, half, images.dtype, images.device)
    size = half + 1
    # The sums of `_spectrum`, inverted.
    (a, b), (u, v) = (part.unbind(2) for part in change)
    waves = images.new_empty(B, C, 2, size, size, 2)
    waves[:, :, 0, ..., 0] = a + b
    waves[:, :, 0, ..., 1] = u + v
    waves[:, :, 1, ..., 0] = v - u
    waves[:, :, 1, ..., 1] = a - b
    lines = torch.bmm(
        transform.rows_back.expand(B * C, -1, -1), waves.view(B * C, 2 * size, 2 * size)
    )
    if _uses_fft(images, half, "back"):
        added: Tensor = torch.fft.irfft(torch.view_as_complex(lines.view(B, C, H, size, 2)), n=W)
    else:
        added = torch.mm(lines.view(-1, 2 * size), transform.columns_back).view(B, C, H, W)
    return added.add_(images)


def _uses_fft(images: Tensor, half: int, way: Literal["forward", "back"]) -> bool:
    """Return whether rows are transformed by FFT: on a CPU, for wide windows and smooth widths.

    A width with a prime factor above 7 makes an FFT slow. A GPU is faster with products.
    """
    return images.device.type == "cpu" and half >= FFT_HALF[way] and _is_smooth(images.shape[-1])


def _is_smooth(number: int) -> bool:
    for prime in (2, 3, 5, 7):
        while number % prime == 0:
            number //= prime
    return number == 1


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Compute matrix products in full float32, regardless of autocast, TF32 and bf16 settings."""
    on_gpu = device.type == "cuda"
    backends = torch.backends
    backend = backends.cuda.matmul if on_gpu else backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = before


def _precision(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def _half_window(images: Tensor, window: float) -> int:
    if not 0 < window <= 0.5:
        raise ValueError(f"window: found {window}, expected a share in (0, 0.5]")
    return math.floor(min(images.shape[-2:]) * window)


def _check_images(name: str, images: Tensor) -> None:
    check_shape(name, images, (None, None, None, None))
    if not images.dtype.is_floating_point:
        raise ValueError(f"{name}: found {images.dtype}, expected floats")
    if 0 in images.shape:
        raise ValueError(
            f"{name}: found shape {tuple(images.shape)}, expected (B, C, H, W), all positive"
        )


def _check_partner(
    name: str, partner: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    check_shape(name, partner, shape)
    if not partner.dtype.is_floating_point or partner.device != device:
        raise ValueError(
            f"{name}: found {partner.dtype} on {partner.device}, expected floats on {device}"
        )


def _check_ratio(ratio: Tensor, B: int) -> None:
    check_shape("ratio", ratio, (B,))
    if not ratio.dtype.is_floating_point:
        raise ValueError(f"ratio: found {ratio.dtype}, expected floats")
    if ratio.device.type == "cpu" and not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError(f"ratio: found {ratio.tolist()}, expected shares in [0, 1]")
