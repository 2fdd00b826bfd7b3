"""The files of PROMISE12 as the challenge distributes them, with the hospital of each case.

The training data are `Case00.mhd` to `Case49.mhd` with their `.raw`, and `CaseNN_segmentation.mhd`;
the header says nothing about the hospital. The test data are `Case00` to `Case29` again, without
segmentations.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedsgcg.common.images.folders import counted_names, without_suffix
from fedsgcg.common.names import number_of
from fedsgcg.deploy.prepare.conversion import Found
from fedsgcg.deploy.prepare.layouts import Line

CASE: Final = re.compile(r"case[ _-]?(\d{2})([ _-]segmentation)?", re.IGNORECASE)
SITES: Final = {
    **dict.fromkeys(range(13, 26), "RUNMC"),
    **dict.fromkeys((1, *range(26, 38)), "UCL"),
    **dict.fromkeys((0, *range(2, 13)), "BIDMC"),
    **dict.fromkeys(range(38, 50), "HK"),
}
"""Number of a training case -> hospital, as in public loaders of the challenge's data."""


def find(files: Sequence[Path], found: Found) -> list[Line]:
    """List the training cases; a case is an image and its segmentation in one folder.

    Args:
        files: All image files of the download.
        found: Collects missing files and notes.
    """
    images: dict[tuple[Path, int], Path] = {}
    masks: dict[tuple[Path, int], Path] = {}
    for path in files:
        if match := CASE.fullmatch(without_suffix(path.name)):
            (masks if match[2] else images)[path.parent, int(match[1])] = path
    if not masks:
        return []
    found.layout = "PROMISE12 challenge: CaseNN with CaseNN_segmentation"
    drawn: dict[Path, int] = Counter(folder for folder, _ in masks)
    unlabelled: dict[Path, list[Path]] = defaultdict(list)
    lines: dict[int, Line] = {}
    for (folder, number), image in sorted(images.items()):
        mask = masks.pop((folder, number), None)
        if mask is None and not drawn.get(folder):
            unlabelled[folder].append(image)  # a part of the test data
        elif mask is None:
            found.missing(image, f"segmentation of Case{number:02d}")
        elif number in lines:
            found.surplus(image, f"a second file of Case{number:02d}")
        elif number in SITES:
            name = f"Case{number:02d}"
            lines[number] = Line(SITES[number], image, mask, patient=f"PROMISE12-{name}", name=name)
    for (_, number), mask in masks.items():
        found.missing(mask, f"image of Case{number:02d}")
    for folder, paths in unlabelled.items():
        found.torn |= set(paths)
        found.notes.append(
            f"{folder.name}: {number_of(len(paths), 'image')} without segmentation, not used"
        )
    missing: dict[str, list[Path]] = defaultdict(list)
    for number in sorted(SITES.keys() - lines.keys()):
        missing[SITES[number]].append(Path(f"Case{number:02d}"))
    found.notes += [
        counted_names(cases, "case", f"of {site} missing here") for site, cases in missing.items()
    ]
    return list(lines.values())
