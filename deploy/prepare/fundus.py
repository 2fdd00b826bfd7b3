"""Fundus pictures: the released four domains (DoFE, RAM-DSIR), or the original releases cropped about the disc.

Masks become palette pictures with 0 background, 1 rim (disc without cup), 2 cup. Grey values of the release are read as
upstream reads them: up to 50 cup, 51 to 200 disc without cup, above 200 background (methods.md 2.3).

The published training part is divided into `train` and `validation` by the hash of the case, the test part is `test`: a
hospital trains on its training part and, held out, is judged on its test part, as in the papers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clients.data.case_files import split_of
from common.datasets import FUNDUS
from common.errors import fail
from common.images.read import read_volume
from common.images.write import mask_bytes, picture_bytes
from deploy.prepare.conversion import Found, Work, absent, copy_or_link, image_files
from deploy.prepare.fundus_names import PUBLISHED

SIDE: Final = 800
"""Side in pixels of a crop about the disc."""

CUP_LIMIT: Final = 50
DISC_LIMIT: Final = 200
MARKED: Final = {"Domain1": 254, "Domain2": 128}
"""Grey value of a map above which a pixel counts. A soft map of Drishti-GS is 255 where all experts marked the pixel,
the rule of the published crops; RIM-ONE's average of two experts is black and white."""

DOMAINS: Final = tuple(hospital.name for hospital in FUNDUS.hospitals)
PARTS: Final = ("train", "test")

Labels = NDArray[np.uint8]

# (domain, kind) -> how the file is called in its original release.
ORIGINALS: Final = (
    ("Domain1", "image", re.compile(r"(?P<case>drishtiGS_\d{3})\.(png|jpe?g)", re.IGNORECASE)),
    ("Domain1", "disc", re.compile(r"(?P<case>drishtiGS_\d{3})_ODsegSoftmap\.png", re.IGNORECASE)),
    ("Domain1", "cup", re.compile(r"(?P<case>drishtiGS_\d{3})_cupsegSoftmap\.png", re.IGNORECASE)),
    ("Domain2", "image", re.compile(r"(?P<case>[GNS]-\d+-[LR])\.(jpe?g|png)", re.IGNORECASE)),
    ("Domain2", "disc", re.compile(r"(?P<case>[GNS]-\d+-[LR])-Disc-Avg\.png", re.IGNORECASE)),
    ("Domain2", "cup", re.compile(r"(?P<case>[GNS]-\d+-[LR])-Cup-Avg\.png", re.IGNORECASE)),
    ("Domain3", "image", re.compile(r"(?P<case>[gn]\d{4})\.jpe?g", re.IGNORECASE)),
    ("Domain3", "grey", re.compile(r"(?P<case>[gn]\d{4})\.(bmp|png)", re.IGNORECASE)),
    ("Domain4", "image", re.compile(r"(?P<case>V\d{4})\.jpe?g", re.IGNORECASE)),
    ("Domain4", "grey", re.compile(r"(?P<case>V\d{4})\.(bmp|png)", re.IGNORECASE)),
)
# Other experts, other maps and the REFUGE test part: in the releases, not in the benchmark.
UNUSED: Final = re.compile(
    r".*(-exp[12]|seg.*map|_?OD(Avg)?|_?cup(Avg)?)\.(png|bmp)|T\d{4}\.(jpe?g|bmp|png)",
    re.IGNORECASE,
)


def find(source: Path, validation_fraction: float, *, link: bool) -> Found:
    """Recognise the layout below a folder and list its cases.

    Args:
        source: The folder that was downloaded and unpacked.
        validation_fraction: Share of the published training part that becomes source validation.
        link: Link to pictures that need no change instead of copying them.

    Raises:
        FedsgcgError: DAT-120 when the folder holds neither layout, saying what to fetch.
    """
    looked = Found("")
    files = image_files(source, looked)
    root = _released_root(files)
    found = _laid_out(source, files, root, validation_fraction, link=link)
    found.problems, found.notes = [*looked.problems, *found.problems], [*looked.notes, *found.notes]
    return found


def _laid_out(
    source: Path,
    files: Sequence[Path],
    root: Path | None,
    validation_fraction: float,
    *,
    link: bool,
) -> Found:
    """List the cases of the released layout where there is a root of it, else of the original one."""
    if root is not None:
        return _released(root, files, validation_fraction, link=link)
    index = _original_index(files)
    if not any(index.values()):
        raise absent(
            "fundus", source, f"{len(files)} image files, none in a known place or of a known name"
        )
    return _original(source, files, index, validation_fraction)


def labels_of(grey: NDArray[Any]) -> Labels:
    """Return 0 background, 1 rim, 2 cup of the release's grey values; any shape."""
    return np.where(grey <= CUP_LIMIT, 2, np.where(grey <= DISC_LIMIT, 1, 0)).astype(np.uint8)


def window(disc: NDArray[np.bool_], side: int = SIDE) -> tuple[int, int]:
    """Return the first row and column of the square about the disc's bounding box.

    The square is centred on the box and then moved into the picture; along an axis that is shorter than the square it
    begins before the picture, which is centred in it.

    Args:
        disc: (H, W).
        side: Side of the square in pixels.

    Raises:
        FedsgcgError: DAT-125 when there is no disc, or one larger than the square.
    """
    starts = []
    for axis, length in enumerate(disc.shape):
        along = np.flatnonzero(disc.any(axis=1 - axis))
        if along.size == 0:
            raise fail(
                "DAT-125",
                found="a mask without a disc",
                expected="a disc",
                action="Check the mask.",
            )
        first, last = int(along[0]), int(along[-1])
        if last - first >= side:
            raise fail(
                "DAT-125", found=f"a disc of {last - first + 1} pixels", expected=f"at most {side}"
            )
        start = (first + last + 1) // 2 - side // 2
        starts.append(
            min(max(start, 0), length - side) if length >= side else -((side - length) // 2)
        )
    return starts[0], starts[1]


def cut(array: NDArray[Any], start: tuple[int, int], side: int = SIDE) -> NDArray[Any]:
    """Cut a square out of (H, W) or (H, W, C); what lies outside the picture is 0."""
    out = np.zeros((side, side, *array.shape[2:]), array.dtype)
    rows, columns = (
        slice(max(s, 0), min(s + side, n)) for s, n in zip(start, array.shape[:2], strict=True)
    )
    piece = array[rows, columns]
    top, left = max(-start[0], 0), max(-start[1], 0)
    out[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
    return out


def grey_values(path: Path) -> NDArray[np.uint8]:
    """Return the grey values (H, W) of a mask, colours turned grey as upstream does.

    Raises:
        FedsgcgError: DAT-103 when it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("L"))
    except (
        Exception
    ) as error:  # damaged bytes raise nearly anything; one file must not stop the others
        found = f"{type(error).__name__}: {error}"
        raise fail("DAT-103", found=found, action="Get the file again.", where=str(path)) from error


# the released layout


def _released_root(files: Sequence[Path]) -> Path | None:
    """Return the folder that holds Domain1 ... Domain4, None when no file lies below such a folder."""
    for path in files:
        for parent in path.parents:
            if parent.name in DOMAINS and path.is_relative_to(
                parent / "train"
            ) | path.is_relative_to(parent / "test"):
                return parent.parent
    return None


def _released(
    root: Path, files: Sequence[Path], validation_fraction: float, *, link: bool
) -> Found:
    found = Found(f"released crops, Domain1 to Domain4 below {root}")
    present = set(files)
    for domain in DOMAINS:
        for part in PARTS:
            pairs, from_list = _listed_pairs(root, domain, part, files)
            if from_list is not None:
                found.notes.append(
                    f"{domain} {part}: {len(pairs)} cases as listed in {from_list.name}"
                )
            for image, mask in pairs:
                gone = [path for path in (image, mask) if path not in present]
                for path in gone:
                    found.missing(path, "such file")
                    found.torn |= {image, mask} - set(gone)
                if not gone:
                    make = partial(_make_released, image, mask, link)
                    found.work.append(
                        _work(domain, part, image.stem, (image, mask), make, validation_fraction)
                    )
    found.extras(files)
    return found


def _listed_pairs(
    root: Path, domain: str, part: str, files: Sequence[Path]
) -> tuple[list[tuple[Path, Path]], Path | None]:
    """Return (image, mask) of a part: those of its list file where there is one, else those of the published names.

    Upstream has lists beside the domains with paths from there, and lists within a domain with paths from the domain.
    """
    for path in (root / f"{domain}_{part}.list", root / domain / f"{part}.list"):
        if path.is_file():
            lines = [
                line.split()
                for line in path.read_text(encoding="utf-8-sig").splitlines()
                if line.strip()
            ]
            if wrong := [number for number, words in enumerate(lines, 1) if len(words) != 2]:
                found = f"line {wrong[0]} has not two paths"
                raise fail(
                    "DAT-120",
                    where=str(path),
                    found=found,
                    expected="image and mask, with a blank between",
                )
            return [
                (_place(root, domain, one), _place(root, domain, two)) for one, two in lines
            ], path
    folder = root / domain / part / "ROIs"
    suffixes = {path.stem: path.suffix for path in files if path.parent == folder / "image"}
    masks = {path.stem: path.suffix for path in files if path.parent == folder / "mask"}
    names = sorted(PUBLISHED[domain, part])
    return [
        (
            folder / "image" / (name + suffixes.get(name, ".png")),
            folder / "mask" / (name + masks.get(name, ".png")),
        )
        for name in names
    ], None


def _place(root: Path, domain: str, text: str) -> Path:
    """Return the file that a path of a list means; one that leads out of the folder counts as missing there."""
    text = text.replace("\\", "/").lstrip("/")
    inside = [base / text for base in (root, root / domain) if ".." not in Path(text).parts]
    return next(
        (path for path in inside if path.is_file()),
        inside[0] if inside else root / domain / Path(text).name,
    )


def _make_released(image: Path, mask: Path, link: bool, to_image: Path, to_mask: Path) -> str:
    pixels = _pixels(image)
    labels = labels_of(grey_values(mask))
    _check_pair(pixels, labels, image)
    if image.suffix.lower() == ".png":
        copy_or_link(image, to_image, link=link)
    else:
        to_image.write_bytes(picture_bytes(pixels))
    to_mask.write_bytes(mask_bytes(labels))
    return (
        ""
        if labels.shape == (SIDE, SIDE)
        else f"{labels.shape[1]} x {labels.shape[0]} pixels, not {SIDE} x {SIDE}"
    )


# the original releases


def _original_index(files: Sequence[Path]) -> dict[tuple[str, str], list[tuple[str, Path]]]:
    """Sort files by domain and kind: (published case name, file)."""
    numbers = {name[-3:]: name for part in PARTS for name in PUBLISHED["Domain1", part]}
    index: dict[tuple[str, str], list[tuple[str, Path]]] = {
        (domain, kind): [] for domain, kind, _ in ORIGINALS
    }
    for path in files:
        for domain, kind, pattern in ORIGINALS:
            if match := pattern.fullmatch(path.name):
                case = match["case"]
                index[domain, kind].append(
                    (numbers.get(case[-3:], case) if domain == "Domain1" else case, path)
                )
                break
    return index


def _original(
    source: Path,
    files: Sequence[Path],
    index: dict[tuple[str, str], list[tuple[str, Path]]],
    validation_fraction: float,
) -> Found:
    found = Found(f"original releases below {source}, cropped to {SIDE} x {SIDE} about the disc")
    found.notes += [
        "crops are centred on the disc's bounding box; the released crops were made by another program, so they "
        "differ by some pixels",
        "Drishti-GS: a pixel counts when all experts marked it (soft map 255), as in the published crops; RIM-ONE r3: "
        "left half of the stereo picture, average of the two experts",
    ]
    for domain in DOMAINS:
        kinds = [kind for one, kind, _ in ORIGINALS if one == domain]
        by_kind = {kind: _one_each(found, index[domain, kind]) for kind in kinds}
        for part in PARTS:
            for case in sorted(PUBLISHED[domain, part]):
                paths = [by_kind[kind].get(case) for kind in kinds]
                for kind, path in zip(kinds, paths, strict=True):
                    if path is None:
                        name = "mask" if kind == "grey" else kind
                        found.missing(source / f"{domain} {case} ({name})", f"{name} of {case}")
                whole = tuple(path for path in paths if path is not None)
                if len(whole) != len(kinds):
                    found.torn |= set(whole)
                else:
                    make = partial(_make_original, domain, whole)
                    found.work.append(_work(domain, part, case, whole, make, validation_fraction))
    found.extras(files, lambda path: bool(UNUSED.fullmatch(path.name)))
    return found


def _one_each(found: Found, files: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Return one file a case; a second of the same name is extra."""
    chosen: dict[str, Path] = {}
    for case, path in files:
        if chosen.setdefault(case, path) != path:
            found.surplus(path, f"a second file of {case}")
    return chosen


def _make_original(domain: str, sources: tuple[Path, ...], to_image: Path, to_mask: Path) -> str:
    pixels = _pixels(sources[0])
    if domain == "Domain2":
        pixels = pixels[:, : _one_eye(pixels.shape)]
    if len(sources) == 2:
        labels = labels_of(grey_values(sources[1]))
    else:
        disc, cup = (_marked(path, pixels.shape[1], MARKED[domain]) for path in sources[1:])
        if disc.shape != cup.shape:
            found = f"cup {cup.shape[::-1]}, disc {disc.shape[::-1]}"
            raise fail("DAT-104", found=found, expected="equal sizes", where=str(sources[1]))
        labels = np.where(cup, 2, np.where(disc, 1, 0)).astype(np.uint8)
    _check_pair(pixels, labels, sources[0])
    start = window(labels > 0)
    to_image.write_bytes(picture_bytes(cut(pixels, start)))
    to_mask.write_bytes(mask_bytes(cut(labels, start)))
    return ""


def _one_eye(shape: tuple[int, ...]) -> int:
    """Columns of the left half of a stereo picture; all of a picture that is higher than wide."""
    return shape[1] // 2 if shape[1] > shape[0] else shape[1]


def _marked(path: Path, columns: int, limit: int) -> NDArray[np.bool_]:
    """Return where a map exceeds a grey value, in the left half of one that covers a stereo pair."""
    return grey_values(path)[:, :columns] > limit


# both


def _work(
    domain: str,
    part: str,
    case: str,
    sources: tuple[Path, ...],
    make: Any,
    validation_fraction: float,
) -> Work:
    split = "test" if part == "test" else split_of(case, validation_fraction)
    suffixes = (".png", ".png")
    return Work(domain, case, sources, suffixes, make, patient=case, split=split, published=part)


def _pixels(path: Path) -> NDArray[np.uint8]:
    """Return a colour picture as (H, W, 3)."""
    array = read_volume(path).array
    if array.ndim != 3 or array.shape[0] != 3:
        raise fail(
            "DAT-125",
            found=f"{array.shape[0]} channels",
            expected="a colour picture",
            where=str(path),
        )
    return np.ascontiguousarray(array.transpose(1, 2, 0), dtype=np.uint8)


def _check_pair(pixels: NDArray[np.uint8], labels: Labels, path: Path) -> None:
    """Refuse a mask of another size (DAT-104) or without a disc (DAT-125)."""
    if pixels.shape[:2] != labels.shape:
        found, expected = (
            f"{columns}x{rows}" for rows, columns in (labels.shape, pixels.shape[:2])
        )
        raise fail(
            "DAT-104",
            found=found,
            expected=expected,
            action="Get both files again.",
            where=str(path),
        )
    if not labels.any():
        raise fail(
            "DAT-125",
            found="a mask without disc",
            expected="a disc",
            action="Check it.",
            where=str(path),
        )
