"""Gaussian noise from a cipher's key stream.

The key comes from the operating system's entropy, or in a simulation from the study's seed. Two
forms of noise, because of floating-point numbers (Mironov, CCS 2012; Canonne, Kamath and Steinke,
NeurIPS 2020; Holohan and Braghin, 2021):

- `integers`: the discrete Gaussian, drawn exactly with integer arithmetic. No floating-point number
  is involved, so the mechanism is the one that the proof is about. For the statistics.
- `normals`: Box-Muller in float64, for the millions of weights for which exact sampling is too
  slow. `rounded` puts the noisy sum on a grid of std / 1024, which removes the low bits that would
  show the sum. What remains is that float64 has no values beyond 8.5 standard deviations (1e-17 of
  a Gaussian) and a resolution of 2^-53 in the uniform numbers; this part is an approximation.

The time that a draw takes depends on the noise and is not hidden.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

BLOCK: Final = 1 << 16
"""Bytes of the key stream that are read at a time."""
KEY_BYTES: Final = 32
FIRST: Final = bytes(16)
"""Counter and nonce of the stream; a key is used for one stream only."""
GRID: Final = 1024
"""Steps of the grid of `rounded` per standard deviation."""


class Noise:
    """A stream of random numbers for privacy, from ChaCha20.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"key: found {len(key)} bytes, expected {KEY_BYTES}")
        self._cipher = Cipher(ChaCha20(key, FIRST), mode=None).encryptor()
        self._left = b""

    @classmethod
    def from_entropy(cls) -> Noise:
        """Return a stream that nobody can predict or repeat, from the operating system."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def seeded(cls, seed: int, *names: str | int) -> Noise:
        """Return a stream that whoever knows the seed can repeat: no privacy, for simulations."""
        text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
        return cls(hashlib.blake2b(text.encode(), digest_size=KEY_BYTES, key=b"noise").digest())

    def below(self, limit: int) -> int:
        """Return a uniform integer in [0, limit)."""
        bits = (limit - 1).bit_length()
        if bits == 0:
            return 0
        size, spare = (bits + 7) // 8, -bits % 8
        while (value := int.from_bytes(self._take(size), "little") >> spare) >= limit:
            pass
        return value

    def bernoulli(self, numerator: int, denominator: int) -> bool:
        """Return True with probability numerator / denominator."""
        return self.below(denominator) < numerator

    def integers(self, sigma: int, size: int) -> list[int]:
        """Return independent discrete Gaussians, P(x) proportional to exp(-x^2 / (2 sigma^2)).

        Exact: Canonne, Kamath and Steinke 2020, algorithms 1 to 3.

        Args:
            sigma: Parameter, a whole number of grid steps, 1 or more.
            size: How many.
        """
        if sigma < 1:
            raise ValueError(f"sigma: found {sigma}, expected 1 or more")
        return [self._discrete_gaussian(sigma) for _ in range(size)]

    def uniforms(self, size: int) -> npt.NDArray[np.float64]:
        """Return uniform numbers in (0, 1], with 53 bits each."""
        words = np.frombuffer(self._take(8 * size), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53

    def normals(self, size: int) -> npt.NDArray[np.float64]:
        """Return standard normal numbers in float64 (Box-Muller); the module says their limits."""
        half = (size + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniforms(half)))
        angle = 2.0 * math.pi * self.uniforms(half)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:size]

    def rounded(self, values: npt.NDArray[np.float64], std: float) -> npt.NDArray[np.float64]:
        """Return values (N,) plus Gaussian noise of a deviation, on a grid of std / 1024."""
        step = std / GRID
        noisy: npt.NDArray[np.float64] = values + std * self.normals(values.size)
        return np.rint(noisy / step) * step

    def _take(self, size: int) -> bytes:
        while len(self._left) < size:
            self._left += self._cipher.update(bytes(max(BLOCK, size - len(self._left))))
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    def _bernoulli_exp(self, numerator: int, denominator: int) -> bool:
        """Return True with probability exp(-numerator / denominator)."""
        while numerator > denominator:
            if not self._bernoulli_exp(1, 1):
                return False
            numerator -= denominator
        trials = 1
        while self.bernoulli(numerator, denominator * trials):
            trials += 1
        return trials % 2 == 1

    def _discrete_laplace(self, scale: int) -> int:
        """Return x with P(x) proportional to exp(-|x| / scale)."""
        while True:
            low = self.below(scale)
            if not self._bernoulli_exp(low, scale):
                continue
            high = 0
            while self._bernoulli_exp(1, 1):
                high += 1
            size, negative = low + scale * high, self.below(2) == 1
            if size or not negative:
                return -size if negative else size

    def _discrete_gaussian(self, sigma: int) -> int:
        scale, square = sigma + 1, sigma * sigma
        while True:
            value = self._discrete_laplace(scale)
            distance = abs(value) * scale - square
            if self._bernoulli_exp(distance * distance, 2 * square * scale * scale):
                return value
