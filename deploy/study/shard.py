"""`shard=K/N`: the K-th of N parts of a study's cells, for job arrays and machines without Ray."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedsgcg.common.errors import fail

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One of several parts of a study.

    Attributes:
        number: Number of this part, 1 to `of`.
        of: Number of parts.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str, cells: int) -> Shard | None:
        """Read `K/N`; "" is no shard.

        Args:
            text: The setting.
            cells: Number of cells of the study.

        Raises:
            FedsgcgError: CFG-001 if it is not `K/N` with 1 <= K <= N <= `cells`.
        """
        if not text:
            return None
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found and 1 <= int(found[1]) <= int(found[2]) <= cells:
            return cls(int(found[1]), int(found[2]))
        expected = f"K/N with K from 1 to N, and N at most {cells}, the cells of this study"
        action = "for 8 jobs give them shard=1/8 to shard=8/8"
        raise fail("CFG-001", where="shard", found=text, expected=expected, action=action)

    def part(self, cells: Sequence[T]) -> list[T]:
        """Return the cells of this part, in their order.

        Every cell is in exactly one part, and the parts differ by at most one cell. The parts do
        not depend on which cells are done, because the other parts run at the same time. Each block
        of N cells is dealt out with another start, so that no part has only the slowest method.
        """
        return [
            cell
            for index, cell in enumerate(cells)
            if (index + index // self.of) % self.of == self.number - 1
        ]

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"
