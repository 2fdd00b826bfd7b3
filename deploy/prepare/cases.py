"""Makes the prepared files of own cases: unique names, checks, copies or links.

Every pair is read and checked (readable, finite, mask aligned with its image, integer label
values); valid pairs are copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsgcg.clients.data.slices import read_binary
from fedsgcg.common.images import dicom
from fedsgcg.common.images.folders import stem_of
from fedsgcg.common.images.formats import DICOM
from fedsgcg.common.images.layers import Layers
from fedsgcg.common.images.read import (
    Volume,
    check_geometry,
    check_image,
    read_volume,
    segments_of,
    segments_together,
    suffix_of,
)
from fedsgcg.common.images.write import write_like
from fedsgcg.common.names import printable
from fedsgcg.deploy.prepare.conversion import FOLDER, Work, copy_or_link
from fedsgcg.deploy.prepare.layouts import Line

if TYPE_CHECKING:
    from fedsgcg.deploy.prepare.labels import Labels


def named(lines: Sequence[Line]) -> list[Line]:
    """Give every case of a site a unique name.

    The name is the file's. Cases that share it also get the names of up to two parent folders, and
    finally a number.
    """
    named = [replace(line, name=line.name or printable(stem_of(line.image))) for line in lines]
    for depth in (1, 2):
        counts = Counter((line.site, line.name.lower()) for line in named)
        for index, line in enumerate(named):
            if counts[line.site, line.name.lower()] > 1:
                parts = [*line.image.parts[-1 - depth : -1], line.name or stem_of(line.image)]
                named[index] = replace(line, name=printable("_".join(parts)))
    counts = Counter()
    for index, line in enumerate(named):
        counts[line.site, line.name.lower()] += 1
        number = counts[line.site, line.name.lower()]
        if number > 1:
            named[index] = replace(line, name=f"{line.name}_{number}")
    return named


def work_of(line: Line, labels: Labels, *, link: bool) -> Work:
    """Return the conversion of a case; `labels` collects the values of its mask."""
    if line.mask is not None and line.mask.is_dir() and not line.structures:
        several = tuple(dicom.segmentations_in(line.mask))
        line = replace(line, segmentations=several if len(several) > 1 else ())
    make = partial(_make, line, labels, link)
    # An unknown patient is left open, so that `data check` can say that each case counts as one.
    return Work(
        line.site,
        line.name,
        (*(line.files or (line.image,)), *line.masks),
        (
            "" if line.files else _target_suffix(line.image),
            FOLDER if line.segmentations else _mask_suffix(line.mask),
        ),
        make,
        patient=line.patient,
        split=line.split,
        structures=tuple((name, _mask_suffix(path)) for name, path in line.structures),
        labels=labels,
    )


def _mask_suffix(path: Path | None) -> str:
    """Return the suffix of a prepared mask, "" for none; `.dcm` for a segmentation of DICOM."""
    if path is None:
        return ""
    return _target_suffix(path) or DICOM.suffixes[0]


def _target_suffix(path: Path) -> str:
    """Return the suffix of the prepared file: a header with separate data becomes NIfTI."""
    suffix = suffix_of(path)
    return ".nii.gz" if suffix in (".mhd", ".nhdr", ".hdr", ".img") else suffix


def _store(source: Path, image: Volume, target: Path, *, link: bool) -> None:
    """Copy or link a file, or write it as NIfTI in the geometry of its image."""
    if _target_suffix(source) == suffix_of(source):
        copy_or_link(source, target, link=link)
    else:
        write_like(target, image.array, image)


def _make(line: Line, labels: Labels, link: bool, to_image: Path, *to_masks: Path) -> str:
    """Read and check the image and its masks, then copy or link the files."""
    where = str(line.image)
    if line.files:
        # Only the files of this series.
        _store_dicom(line.files, to_image, link=link)
    image = read_volume(to_image if line.files else line.image)
    check_image(image, where)
    if line.structures:
        masks = np.stack([read_binary(path, image, where) for _, path in line.structures])
        labels.add(Layers(tuple(name for name, _ in line.structures), masks))
        for (_, path), target in zip(line.structures, to_masks, strict=True):
            _store(path, read_volume(path, mask=True), target, link=link)
    elif line.segmentations:
        labels.add(segments_together(line.segmentations, image))
        _store_dicom(line.segmentations, to_masks[0], link=link)
    elif line.mask is not None:
        segments = segments_of(line.mask, image)
        if segments is not None:
            labels.add(segments)
            copy_or_link(_segmentation(line.mask), to_masks[0], link=link)
        else:
            mask = read_volume(line.mask, mask=True)
            check_geometry(image, mask, where)
            labels.check(np.unique(mask.array).tolist(), str(line.mask))
            _store(line.mask, mask, to_masks[0], link=link)
    if not line.files:
        _store(line.image, image, to_image, link=link)
    return "" if line.mask is not None else "no mask: cannot be used for training or evaluation"


def _store_dicom(files: Sequence[Path], folder: Path, *, link: bool) -> None:
    """Copy or link files into a new folder, without their names, which may name the patient."""
    folder.mkdir()
    for number, file in enumerate(files, 1):
        copy_or_link(file, folder / f"{number:05d}.dcm", link=link)


def _segmentation(mask: Path) -> Path:
    """Return the file of a segmentation, which may be the only one of a folder."""
    return next(iter(dicom.segmentations_in(mask)), mask)
