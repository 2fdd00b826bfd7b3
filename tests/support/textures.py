"""Images with the spectrum of natural ones, for tests of amplitudes."""

import numpy as np

SIDE = 32


def textures(rng, count, side=SIDE, contrast=0.2):
    """(count, S, S) images with the falling spectrum of natural ones, in [-1, 1]."""
    frequency = np.fft.fftfreq(side) * side
    radius = np.hypot(frequency[:, None], frequency).clip(1)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((count, side, side))) / radius).real
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    noise *= contrast / noise.std(axis=(1, 2), keepdims=True)
    return (noise + rng.uniform(-0.4, -0.1, (count, 1, 1))).clip(-1, 1)
