"""Parts of the page that several sections share: heads of columns, and panels with their titles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedsgcg.server.report.figures.drawing import Drawing
from fedsgcg.server.report.labels import Group

TitledDrawing = tuple[tuple[str, ...], Drawing]
"""A figure with the titles under which the page shows it, outermost first."""


@dataclass(frozen=True)
class Column:
    """Head of a column of a table.

    Attributes:
        title: Name of the hospital, or "Average".
        detail: Second line, "" for none.
        hospital: The hospital whose results the column has, "" for the average.
    """

    title: str
    detail: str
    hospital: str = ""


AVERAGE_COLUMN = Column("Average", "hospitals have equal weight")


@dataclass(frozen=True)
class ClassShare:
    """How much of the scatter of one class is between hospitals.

    Attributes:
        name: Name of the class.
        share: Share as shown, in per cent.
    """

    name: str
    share: str


@dataclass(frozen=True)
class Panel:
    """One figure with its caption.

    Attributes:
        title: Caption.
        drawing: The figure.
        detail: Rest of the caption, "" for none.
        shares: Shares between hospitals, shown below a figure of the shift between hospitals.
        hospital: The hospital that it is about, "" for several.
    """

    title: str
    drawing: Drawing
    detail: str = ""
    shares: tuple[ClassShare, ...] = ()
    hospital: str = ""


@dataclass(frozen=True)
class PanelGroup:
    """Panels next to each other.

    Attributes:
        title: Name of the structure, "" if the panels do not differ in it.
        panels: The panels, at least one.
    """

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class PanelBlock:
    """All panels of one group of labels, with one key to the colours.

    Attributes:
        title: What the labels have in common, "" if there is only one group.
        labels: The labels, in the order of the key.
        left_out: Number of labels that no figure shows.
        groups: The panels, by structure.
    """

    title: str
    labels: tuple[str, ...]
    left_out: int
    groups: tuple[PanelGroup, ...]


def untitled(panels: Sequence[Panel]) -> tuple[PanelGroup, ...]:
    """Return the panels as one group without title, or no group without panels."""
    return (PanelGroup("", tuple(panels)),) if panels else ()


def panel_blocks(
    found: Iterable[tuple[Group, tuple[PanelGroup, ...]]],
) -> Iterator[PanelBlock]:
    """One block per group of labels, without groups that have nothing to draw."""
    for group, panels in found:
        if panels:
            yield PanelBlock(group.title, group.labels, group.left_out, panels)


def titled_drawings(
    blocks: Iterable[PanelBlock], *, with_detail: bool = False
) -> Iterator[TitledDrawing]:
    """Every drawing of the blocks with its titles.

    Args:
        blocks: Blocks of the page.
        with_detail: Whether the detail of a panel is one of its titles.
    """
    for block in blocks:
        for group in block.groups:
            for panel in group.panels:
                detail = (panel.detail,) if with_detail else ()
                yield (block.title, group.title, panel.title, *detail), panel.drawing
