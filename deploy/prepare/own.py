"""Data that are nearly canonical: own images, and the shared copies of PROMISE12 and SpineGM.

Own images are listed in a CSV file or have one folder per site. Every pair is read and checked
(readable, finite, mask aligned with its image, integer label values); valid pairs are copied.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from fedsgcg.clients.data.case_files import alike_hospitals
from fedsgcg.clients.data.manifest import read_manifest
from fedsgcg.clients.data.slices import whole_label
from fedsgcg.common.datasets import CATALOGUE
from fedsgcg.common.errors import CODES, FedsgcgError, Problem, fail
from fedsgcg.common.images.folders import is_file, stem_of, without_suffix
from fedsgcg.common.images.read import (
    Volume,
    check_geometry,
    check_image,
    read_volume,
    suffix_of,
)
from fedsgcg.common.images.write import write_like
from fedsgcg.common.names import printable
from fedsgcg.deploy.prepare.conversion import Found, Work, absent, copy_or_link, image_files
from fedsgcg.deploy.prepare.layouts import Layout, Line, recognise

MAX_LABELS: Final = 64
"""A mask with more distinct values than this is not a label map."""

PIECES: Final = (
    "; if every structure is in one piece, add largest_component: true "
    "(it removes all other pieces)"
)
"""Advice on post-processing, which is off by default."""


VOLUME_RULES: Final = (
    "intensity: percentile   # each volume's 1st to 99th percentile; or minmax, zscore",
    "stack: 3   # channels: a slice and both neighbours; 1 = the slice alone",
)
PICTURE_RULES: Final = (
    "intensity: percentile   # each picture's 1st to 99th percentile; fixed: 0 to 255, 8 bits only",
    "stack: 1   # a picture's channels are its colours, or its grey values three times",
)
RULES: Final = (
    "aspect: pad   # a slice keeps its shape; squeeze = it fills the square training slice",
    "plan: fixed   # auto = image size, spacing, intensity and stack follow from the images",
    "largest_component: false   # true only if every structure is in one piece",
    "fill_holes: false   # true only if no structure has a hole",
)
"""Written with their defaults: they follow from anatomy, never from the masks of all hospitals,
which would include those of the held-out one."""


class Labels:
    """Label values in the masks of a data set.

    Attributes:
        seen: Value -> number of masks that contain it.
        allowed: Values that a mask may contain; None = 0 to 255.
        names: Value -> name of its class, as far as the data set says it.
        regions: Structure -> the values it consists of; empty for one structure a class.
    """

    def __init__(self, allowed: frozenset[int] | None) -> None:
        self.seen: Counter[int] = Counter()
        self.allowed = allowed
        self.names: dict[int, str] = {}
        self.regions: dict[str, tuple[int, ...]] = {}

    def check(self, values: Sequence[float], where: str) -> None:
        """Record the values of one mask; raises DAT-109 for a value that is not allowed."""
        labels = {value: whole_label(value) for value in values}
        allowed = range(256) if self.allowed is None else self.allowed
        odd = [value for value, label in labels.items() if label not in allowed]
        if odd or len(values) > MAX_LABELS:
            found = "values " + ", ".join(f"{value:.9g}" for value in (odd or values)[:8])
            expected = "integers from 0 to 255, one per class"
            if self.allowed is not None:
                expected = "values " + ", ".join(map(str, sorted(self.allowed)))
            raise fail(
                "DAT-109", found=found, expected=expected, action="Correct the mask.", where=where
            )
        self.seen.update({label for label in labels.values() if label is not None})

    def classes(self) -> dict[str, list[int]]:
        """Return a class for each value, the background first."""
        names = {value: f"class_{value}" for value in sorted({*self.seen, *self.names})}
        return {name: [v] for v, name in sorted((names | self.names | {0: "background"}).items())}

    def structures(self) -> dict[str, list[str]]:
        """Return the classes of each structure."""
        names = {value: name for name, (value,) in self.classes().items()}
        if not self.regions:
            return {name: [name] for value, name in names.items() if value}
        return {
            region: [names[value] for value in values if value in names]
            for region, values in self.regions.items()
        }

    def counts(self) -> str:
        """Return the number of masks with each value, "" if no mask was read."""
        return ", ".join(f"{value} in {self.seen[value]}" for value in sorted(self.seen))

    def absent(self) -> list[str]:
        """Return the named values that no mask has."""
        return [f"{name} ({v})" for v, name in sorted(self.names.items()) if v and not self.seen[v]]

    def advice(self) -> str:
        """Return how to declare the values in the data settings."""
        if not self.seen:
            return ""
        classes = ", ".join(f"{name}: {values}" for name, values in self.classes().items())
        listed = ", ".join(map(str, sorted(self.seen)))
        return f"label values {listed}; declare them: classes: {{{classes}}}{PIECES}"


def find(name: str, source: Path, *, link: bool, channel: str = "") -> tuple[Found, Labels]:
    """List the cases of a CSV file, of a folder with `manifest.csv`, or of one folder per site.

    Args:
        name: `promise12`, `spinegm`, or `manifest` for own data.
        source: CSV file or folder.
        link: Link to the files instead of copying them.
        channel: Name or number of the channel of a folder of nnU-Net; "" = the first one.

    Returns:
        The cases, and the label values, which the conversion fills in.

    Raises:
        FedsgcgError: DAT-120 when there is no case; the error says what is needed.
    """
    table = source if source.is_file() else source / "manifest.csv"
    labels = Labels({"promise12": frozenset({0, 1}), "spinegm": frozenset({0, 1, 2})}.get(name))
    listed = table.is_file()
    layout = f"table {table}" if listed else f"one folder per hospital in {source}"
    found = Found(layout, published=listed or name in CATALOGUE)
    files = [] if source.is_file() else image_files(source, found)
    other = None if listed or name in CATALOGUE else recognise(source, files, channel)
    if other is not None:
        lines = _adopt(other, labels, found)
    else:
        lines = _from_table(name, table, found) if listed else _from_folders(files, source, found)
    if not lines:
        reasons = [_nothing(len(files), listed)]
        reasons += [problem.found for problem in found.problems if problem.code == "DAT-119"]
        raise absent(name, source, "; ".join(reasons))
    found.notes += [
        f"{p.where}: {CODES[p.code]} {p.found}. {p.action}" for p in alike_hospitals(_sites(lines))
    ]
    for line in _named(lines):
        gone = [path for path in (line.image, line.mask) if path is not None and not is_file(path)]
        for path in gone:
            found.missing(path, "such file")
        if gone:
            found.torn |= {path for path in (line.image, line.mask) if path is not None}
        else:
            found.work.append(_work(line, labels, link=link))
    if name in CATALOGUE or table.is_file():
        found.extras(files, lambda path: "preview" in str(path.relative_to(source)))
    return found, labels


def _adopt(layout: Layout, labels: Labels, found: Found) -> list[Line]:
    """Take over what the layout of another tool states."""
    found.layout = layout.title
    found.problems += layout.problems
    found.notes += layout.notes
    labels.names, labels.regions = layout.names, layout.regions
    values = {*layout.names, *(value for group in layout.regions.values() for value in group)}
    if values:
        labels.allowed = frozenset({0, *values})
    return [line for line in layout.lines if line.mask is not None]


def settings_text(folder: Path, labels: Labels, *, pictures: bool) -> str:
    """Return settings for prepared own data, to be edited: names of classes and structures.

    Args:
        folder: The prepared folder.
        labels: The label values of all masks.
        pictures: Whether the images are pictures, whose distances are in pixels.

    Returns:
        Text of a YAML file; "" if the masks do not have the background and another value.
    """
    classes = labels.classes()
    if 0 not in labels.seen or len(classes) < 2:
        return ""
    lines = [
        "# Settings of these data, for `fedsgcg study data=THIS_FILE`. Rename the classes. A",
        "# structure is what is reported; it may consist of several classes.",
        f"name: {json.dumps(folder.resolve().name, ensure_ascii=False)}",
        f"root: {json.dumps(str(folder.resolve()), ensure_ascii=False)}",
        "classes:",
        *(f"  {name}: {values}" for name, values in classes.items()),
        "structures:",
        *(f"  {name}: [{', '.join(parts)}]" for name, parts in labels.structures().items()),
        f"spacing_unit: {'pixel' if pictures else 'mm'}",
        *(PICTURE_RULES if pictures else VOLUME_RULES),
        *RULES,
    ]
    return "\n".join(lines) + "\n"


def _nothing(files: int, listed: bool) -> str:
    if listed:
        return "a table without a usable line"
    return f"{files} image files, no table and no <site>/<case>_image.*"


def _sites(lines: Sequence[Line]) -> list[str]:
    return sorted({line.site for line in lines})


def _from_table(name: str, table: Path, found: Found) -> list[Line]:
    try:
        rows = read_manifest(table)
    except FedsgcgError as error:
        (problem,) = error.problems
        raise absent(
            name, table, f"{problem.found}. {problem.action}".removesuffix(". ")
        ) from error
    lines = []
    seen: set[tuple[str, Path]] = set()
    for row in rows:
        where = f"{table}, line {row.line}"
        image = table.parent / row.image
        mask = table.parent / row.mask if row.mask else None
        path = Path(os.path.normpath(image))
        if wrong := next(row.mistakes(), None):
            found.problems.append(Problem("DAT-125", *wrong, "Correct the line.", where))
        elif (row.site, path) in seen:
            found.surplus(Path(where), "an image that an earlier line already lists")
        elif row.structures:
            action = "Train with data.root=FOLDER OF THE TABLE: it is read without preparing."
            problem = Problem("DAT-125", "one mask file a structure", "one mask", action, where)
            found.problems.append(problem)
        else:
            seen.add((row.site, path))
            lines.append(Line(row.site, image, mask, row.patient, row.split))
    return lines


def _from_folders(files: Sequence[Path], source: Path, found: Found) -> list[Line]:
    """List `<site>/<case>_image.*` with the `<case>_mask.*` in the same folder."""
    stems = {
        path.parent / without_suffix(path.name): path
        for path in files
        if path.parent.parent == source
    }
    lines, masks = [], set()
    for stem, path in stems.items():
        if stem.name.endswith("_image"):
            mask = stems.get(stem.with_name(stem.name.removesuffix("_image") + "_mask"))
            masks.add(mask)
            if mask is None:
                found.missing(path, "mask next to the image")
            lines.append(Line(printable(path.parent.name), path, mask))
    used = {*masks, *(line.image for line in lines)}
    if lines:
        for path in files:
            if path not in used:
                found.surplus(path, "neither an image nor a mask of a case")
    return lines


def _named(lines: Sequence[Line]) -> list[Line]:
    """Give every case of a site a unique name.

    The name is the file's. Cases that share it also get the names of up to two parent folders, and
    finally a number.
    """
    named = [replace(line, name=printable(stem_of(line.image))) for line in lines]
    for depth in (1, 2):
        counts = Counter((line.site, line.name.lower()) for line in named)
        for index, line in enumerate(named):
            if counts[line.site, line.name.lower()] > 1:
                parts = [*line.image.parts[-1 - depth : -1], stem_of(line.image)]
                named[index] = replace(line, name=printable("_".join(parts)))
    counts = Counter()
    for index, line in enumerate(named):
        counts[line.site, line.name.lower()] += 1
        number = counts[line.site, line.name.lower()]
        if number > 1:
            named[index] = replace(line, name=f"{line.name}_{number}")
    return named


def _work(line: Line, labels: Labels, *, link: bool) -> Work:
    sources = (line.image,) if line.mask is None else (line.image, line.mask)
    suffixes = (_target_suffix(line.image), _target_suffix(line.mask) if line.mask else "")
    make = partial(_make, line, labels, link)
    # An unknown patient is left open, so that `data check` can say that each case counts as one.
    return Work(
        line.site, line.name, sources, suffixes, make, patient=line.patient, split=line.split
    )


def _target_suffix(path: Path) -> str:
    """Return the suffix of the prepared file: a header with separate data becomes NIfTI."""
    suffix = suffix_of(path)
    return ".nii.gz" if suffix in (".mhd", ".nhdr", ".hdr", ".img") else suffix


def _store(source: Path, image: Volume, target: Path, *, link: bool) -> None:
    """Copy or link a file, or write it as NIfTI in the geometry of its image."""
    if suffix_of(source) == suffix_of(target):
        copy_or_link(source, target, link=link)
    else:
        write_like(target, image.array, image)


def _make(line: Line, labels: Labels, link: bool, to_image: Path, to_mask: Path) -> str:
    """Read and check the pair, then copy or link both files."""
    image = read_volume(line.image)
    check_image(image, str(line.image))
    if line.mask is not None:
        mask = read_volume(line.mask, mask=True)
        check_geometry(image, mask, str(line.image))
        labels.check(np.unique(mask.array).tolist(), str(line.mask))
        _store(line.mask, mask, to_mask, link=link)
    _store(line.image, image, to_image, link=link)
    return "" if line.mask is not None else "no mask: cannot be used for training or evaluation"
