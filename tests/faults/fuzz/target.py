"""A decoder that is fuzzed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.fuzz.mutations import Mutation


@dataclass(frozen=True)
class Target:
    """One decoder.

    Attributes:
        name: Name of its corpus folder.
        seeds: Honest inputs.
        decode: Reads an input.
        mutate: Changes an input.
        cost: Share of the cases relative to others; slow decoders have less.
    """

    name: str
    seeds: tuple[bytes, ...]
    decode: Callable[[bytes], object]
    mutate: Mutation
    cost: float = 1.0


def file_target(
    folder: Path,
    name: str,
    suffix: str,
    seeds: tuple[bytes, ...],
    read: Callable[[Path], object],
    mutate: Mutation,
    cost: float = 1.0,
) -> Target:
    """A decoder of a file, which is written before each case."""
    path = folder / f"{name}{suffix}"

    def decode(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return Target(name, seeds, decode, mutate, cost)
