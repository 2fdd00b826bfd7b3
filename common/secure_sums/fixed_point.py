"""Real numbers as integers modulo 2^64, in blocks with a bound and a scale each.

A block states `largest`, a power of two that bounds the magnitude of every number of one site. With
S sites and F = 62 - log2(largest) - ceil(log2(S)) fraction bits, a site's integer is at most
largest 2^F + 1/2 in magnitude, hence a sum of S of them at most S largest 2^F + S / 2 <= 2^62 + S /
2 < 2^63 for S < 2^62: no sum of S or fewer sites leaves the range of signed 64-bit integers, so
decoding the sum modulo 2^64 is exact. Rounding to the nearest integer costs each site at most
2^-(F+1), and the total is converted to float64 at the end:

    |decoded - sum of the numbers| <= S 2^-(F+1) + |sum| 2^-53

Arithmetic modulo 2^64 is that of NumPy's uint64. Legend: N numbers of all blocks, S sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedsgcg.common.errors import fail

Words = npt.NDArray[np.uint64]
Array = npt.NDArray[np.float64]

FLOAT_BITS: Final = 53
"""Bits of a float64's significand: a total of more bits is rounded when it is decoded."""


@dataclass(frozen=True)
class Block:
    """Numbers of one kind.

    Attributes:
        name: Name of the block.
        size: How many numbers.
        largest: Bound of the magnitude of each number of one site, a power of two.

    Raises:
        ValueError: A bound that is not a power of two, or a negative size.
    """

    name: str
    size: int
    largest: float

    def __post_init__(self) -> None:
        if self.size < 0 or math.frexp(self.largest)[0] != 0.5:
            raise ValueError(
                f"{self.name}: found {self.size} numbers up to {self.largest}, expected a power of "
                "two"
            )

    def bits(self, sites: int) -> int:
        """Return F, the number of fraction bits of a sum of at most so many sites."""
        if sites < 1:
            raise ValueError(f"sites: found {sites}, expected 1 or more")
        exponent = math.frexp(self.largest)[1] - 1
        return 62 - exponent - math.ceil(math.log2(sites))

    def error(self, sites: int, total: float = 0.0) -> float:
        """Return the largest difference of a decoded sum from the sum of the numbers.

        Args:
            sites: Most sites of the sum (the number that defines the scale).
            total: Largest magnitude of the sum.
        """
        return sites * math.ldexp(1.0, -self.bits(sites) - 1) + math.ldexp(total, -FLOAT_BITS)


def power_of_two(bound: float) -> float:
    """Return the smallest power of two that is at least a positive number."""
    fraction, exponent = math.frexp(bound)
    return bound if fraction == 0.5 else math.ldexp(1.0, exponent)


def encode(blocks: Sequence[Block], numbers: Mapping[str, npt.ArrayLike], sites: int) -> Words:
    """Return one site's numbers as (N,) integers modulo 2^64.

    Args:
        blocks: The blocks, in order.
        numbers: The numbers of each block, in any shape.
        sites: Most sites of the sum.

    Raises:
        FedsgcgError: PRV-957 for a number that is not finite or beyond its block's bound.
        ValueError: Another number of numbers than the block has.
    """
    words = np.empty(sum(block.size for block in blocks), np.uint64)
    start = 0
    for block in blocks:
        values = np.asarray(numbers[block.name], np.float64).reshape(-1)
        if values.size != block.size:
            raise ValueError(f"{block.name}: found {values.size} numbers, expected {block.size}")
        found = float(np.abs(values).max(initial=0.0))
        if not found <= block.largest:  # also for NaN
            raise fail(
                "PRV-957",
                where=block.name,
                found=f"{found:g}" if math.isfinite(found) else "a number that is not finite",
                expected=f"at most {block.largest:g} in magnitude",
                action="look for the cause first (a diverged training, another scale of the "
                "images); then raise the bound in privacy.secure_sums",
            )
        scaled = np.rint(np.ldexp(values, block.bits(sites)))
        words[start : start + block.size] = scaled.astype(np.int64).view(np.uint64)
        start += block.size
    return words


def decode(
    blocks: Sequence[Block], total: Words, sites: int, contributors: int
) -> dict[str, Array]:
    """Return the sums of all blocks.

    Args:
        blocks: The blocks, in order.
        total: (N,) sum of the sites' integers modulo 2^64.
        sites: Most sites of the sum, as in `encode`.
        contributors: Sites of this sum.

    Raises:
        FedsgcgError: PRV-960 for a sum that so many sites cannot have, e.g. one whose masks were
            not removed.
        ValueError: Another number of integers than the blocks have.
    """
    if total.shape != (sum(block.size for block in blocks),) or total.dtype != np.uint64:
        raise ValueError(f"total: found {total.dtype} of shape {total.shape}")
    sums: dict[str, Array] = {}
    start = 0
    for block in blocks:
        part = total[start : start + block.size].view(np.int64).astype(np.float64)
        sums[block.name] = np.ldexp(part, -block.bits(sites))
        most = contributors * (block.largest + block.error(1))
        found = float(np.abs(sums[block.name]).max(initial=0.0))
        if found > most:
            raise fail(
                "PRV-960",
                where=block.name,
                found=f"a sum of {found:g}",
                expected=f"at most {most:g} from {contributors} sites",
                action="nothing of this sum is used; if it repeats, a site runs another version",
            )
        start += block.size
    return sums
