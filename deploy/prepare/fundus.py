"""Fundus pictures: the released four domains (DoFE, RAM-DSIR), or crops of the original releases.

Masks become palette pictures with 0 background, 1 rim (disc without cup), 2 cup. The grey values of
the release have the meaning that they have in the published code of RAM-DSIR: up to 50 cup, 51 to
200 disc without cup, above 200 background (docs/explanation/ram-dsir.md, "Batches and data").

The published training part is divided into `train` and `validation` by
`clients.data.case_files.validation_patients`; the test part is `test`. A hospital trains on its
training part and, when it is held out, is evaluated on its test part, as in the papers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedsgcg.clients.data.case_files import validation_patients
from fedsgcg.common.datasets import FUNDUS
from fedsgcg.common.errors import fail
from fedsgcg.common.images.read import read_volume
from fedsgcg.common.images.write import mask_bytes, picture_bytes
from fedsgcg.common.names import number_of
from fedsgcg.deploy.prepare.conversion import Found, Work, absent, copy_or_link, image_files

SIDE: Final = 800
"""Side in pixels of a crop around the disc."""

CUP_LIMIT: Final = 50
DISC_LIMIT: Final = 200
MARKED: Final = {"Domain1": 254, "Domain2": 128}
"""Grey value of a map above which a pixel is marked.

A soft map of Drishti-GS is 255 where all experts marked the pixel, which is the rule of the
published crops. RIM-ONE's average of two experts is black and white.
"""

DOMAINS: Final = tuple(hospital.name for hospital in FUNDUS.hospitals)
PARTS: Final = ("train", "test")

Labels = NDArray[np.uint8]

# Domain, kind of file, and file name in the original release.
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
# Single experts, other maps and the REFUGE test part: in the releases, but not in the benchmark.
UNUSED: Final = re.compile(
    r".*(-exp[12]|seg.*map|_?OD(Avg)?|_?cup(Avg)?)\.(png|bmp)|T\d{4}\.(jpe?g|bmp|png)",
    re.IGNORECASE,
)

# Case names of the published split, from the list files of RAM-DSIR (commit f7eddf7,
# dataset/fundus). They give missing files a name, and give the original releases the same training
# and test parts as the released crops.
#
# Drishti-GS: g (glaucoma) or n (normal), and the number of the image.
_DRISHTI_TRAIN = """
n089 g024 g002 g022 n057 n041 n042 g015 n017 g061 g049 g040 g066 g064 g080 g032 g058 n036 n008 g084
g069 n035 g016 g051 g076 g062 g010 g012 n094 n047 g081 g068 g045 g044 n037 g026 g088 n033 g060 n092
g038 n101 g075 n090 g063 g004 n046 g031 n098 n018
"""
_DRISHTI_TEST = """
g039 n091 g025 g052 g056 g079 g087 g073 g029 n013 n007 g059 g019 g086 n099 n085 g083 g005 g020 g006
g065 g048 g023 g067 g030 g054 n009 g003 g077 g034 n093 g050 g071 g028 g053 g001 g027 n096 g043 g082
n072 g070 g021 n097 g074 g055 g014 n100 n078 g011 n095
"""
_RIM_ONE_TRAIN = """
S-22-L N-71-L N-27-L N-59-L S-10-R N-10-R G-32-L N-14-R S-1-L G-16-R S-28-R N-76-R S-24-R N-24-R
N-74-L G-17-L G-5-R N-81-L N-84-R S-16-R G-1-L G-14-R G-21-R S-23-L G-36-R S-14-R N-26-R N-85-L
S-20-L N-68-R S-11-L G-6-L N-91-L N-82-R N-90-R N-55-L N-73-R G-20-L G-7-L N-69-L N-58-R G-18-R
G-34-L S-19-R N-87-L N-72-R N-12-R N-70-R G-3-R G-19-R G-12-L N-6-R S-12-L N-5-L G-8-R G-39-L S-13-R
G-37-R S-17-L S-21-R N-53-L G-35-R N-64-R N-25-L N-63-L N-9-L N-11-L N-13-L N-92-R G-9-R S-26-R
N-54-R N-83-L G-15-L N-79-L G-13-R N-61-L N-86-R G-38-L S-15-L N-56-R N-65-L N-16-R S-27-L G-4-L
N-66-R G-11-R N-80-R S-25-L N-52-R N-75-R N-88-R N-8-L N-67-L G-33-R S-18-L N-7-L N-62-R G-10-L
"""
_RIM_ONE_TEST = """
S-29-R S-2-L N-4-R N-33-L G-29-R N-50-R N-43-L N-39-L N-3-L N-2-R N-46-R N-51-L N-30-R N-18-R S-7-L
N-49-L G-25-L S-31-L N-31-L N-37-L G-2-R N-36-R G-24-L N-48-R N-40-R S-33-R S-6-R N-41-L N-78-R
S-35-R G-26-R G-22-L S-9-L G-31-R G-27-R N-35-L S-8-R S-4-L S-3-R N-1-L N-44-R G-28-L N-32-R N-38-R
N-29-L S-32-L S-5-L N-23-L N-17-L S-30-L N-28-R N-47-L N-21-L G-23-R N-22-R N-34-R S-34-L N-42-R
G-30-L N-20-R
"""
# REFUGE training: g0001 to g0040 and n0001 to n0360. Cases not in the test part are training cases.
_REFUGE_TRAIN_TEST = """
n0278 n0170 n0128 n0055 n0312 n0275 n0154 n0184 n0293 n0310 n0329 n0243 n0200 n0147 g0031 n0211
n0268 n0140 n0241 n0056 n0069 n0305 n0101 n0144 n0266 n0222 g0001 n0250 n0028 n0087 n0054 n0294
n0031 n0313 n0064 n0136 n0326 n0356 n0254 n0137 n0348 n0012 n0199 n0133 n0098 n0228 g0033 g0015
n0328 n0045 n0277 n0032 n0332 n0316 n0300 n0107 n0291 n0314 n0138 n0176 n0207 n0024 n0139 n0301
n0015 n0072 g0002 n0284 g0004 n0097 n0331 n0288 n0177 n0004 n0197 n0159 g0008 n0318 n0077 n0050
"""
# REFUGE validation: V0001 to V0400.
_REFUGE_VALIDATION_TEST = """
158 328 212 341 334 324 366 201 377 25 11 20 299 357 82 132 217 197 55 221 62 273 187 147 281 267
186 96 350 172 312 49 194 360 135 19 27 81 102 90 182 315 388 183 60 145 39 254 2 275 250 35 69 257
89 291 125 316 78 330 45 33 381 276 314 331 128 222 22 12 256 282 17 258 358 175 31 3 154 284
"""


def _drishti(names: str) -> frozenset[str]:
    return frozenset(f"{name[0]}drishtiGS_{name[1:]}" for name in names.split())


_REFUGE_TRAIN: Final = frozenset(
    [f"g{number:04d}" for number in range(1, 41)] + [f"n{number:04d}" for number in range(1, 361)]
)
_REFUGE_VALIDATION: Final = frozenset(f"V{number:04d}" for number in range(1, 401))
_TEST3: Final = frozenset(_REFUGE_TRAIN_TEST.split())
_TEST4: Final = frozenset(f"V{int(number):04d}" for number in _REFUGE_VALIDATION_TEST.split())

PUBLISHED: Final[dict[tuple[str, str], frozenset[str]]] = {
    ("Domain1", "train"): _drishti(_DRISHTI_TRAIN),
    ("Domain1", "test"): _drishti(_DRISHTI_TEST),
    ("Domain2", "train"): frozenset(_RIM_ONE_TRAIN.split()),
    ("Domain2", "test"): frozenset(_RIM_ONE_TEST.split()),
    ("Domain3", "train"): _REFUGE_TRAIN - _TEST3,
    ("Domain3", "test"): _TEST3,
    ("Domain4", "train"): _REFUGE_VALIDATION - _TEST4,
    ("Domain4", "test"): _TEST4,
}
"""(domain, part) -> names of its cases, without suffix."""


def find(source: Path, validation_fraction: float, *, link: bool) -> Found:
    """Recognise the layout of a folder and list its cases.

    Args:
        source: The folder that was downloaded and unpacked.
        validation_fraction: Share of the published training part that becomes source validation.
        link: Link to pictures that need no change instead of copying them.

    Raises:
        FedsgcgError: DAT-120 when the folder has neither layout; the error says what to download.
    """
    listing = Found("")
    files = image_files(source, listing)
    root = _released_root(files)
    found = _laid_out(source, files, root, link=link)
    found.work = _with_validation(found.work, validation_fraction)
    found.problems = [*listing.problems, *found.problems]
    found.notes = [*listing.notes, *found.notes]
    return found


def _laid_out(
    source: Path,
    files: Sequence[Path],
    root: Path | None,
    *,
    link: bool,
) -> Found:
    """List the cases of the released layout if it has a root, else of the original layout."""
    if root is not None:
        return _released(root, files, link=link)
    index = _original_index(files)
    if not any(index.values()):
        raise absent(
            "fundus", source, f"{len(files)} image files, none with a known location or name"
        )
    return _original(source, files, index)


def labels_of(grey: NDArray[Any]) -> Labels:
    """Return the labels 0 background, 1 rim, 2 cup for the release's grey values; any shape."""
    return np.where(grey <= CUP_LIMIT, 2, np.where(grey <= DISC_LIMIT, 1, 0)).astype(np.uint8)


def window(disc: NDArray[np.bool_], side: int = SIDE) -> tuple[int, int]:
    """Return the first row and column of the square around the disc's bounding box.

    The square is centred on the box and then shifted into the picture. Along an axis on which the
    picture is smaller than the square, the picture is centred in the square, so the first row or
    column is negative.

    Args:
        disc: (H, W).
        side: Side of the square in pixels.

    Raises:
        FedsgcgError: DAT-125 when there is no disc, or when it is larger than the square.
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
        if length < side:
            starts.append(-((side - length) // 2))
            continue
        start = (first + last + 1) // 2 - side // 2
        starts.append(min(max(start, 0), length - side))
    return starts[0], starts[1]


def cut(array: NDArray[Any], start: tuple[int, int], side: int = SIDE) -> NDArray[Any]:
    """Cut a square out of (H, W) or (H, W, C); pixels outside the picture are 0."""
    out = np.zeros((side, side, *array.shape[2:]), array.dtype)
    rows, columns = (
        slice(max(s, 0), min(s + side, n)) for s, n in zip(start, array.shape[:2], strict=True)
    )
    piece = array[rows, columns]
    top, left = max(-start[0], 0), max(-start[1], 0)
    out[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
    return out


def grey_values(path: Path) -> NDArray[np.uint8]:
    """Return the grey values (H, W) of a mask; colours are converted as in the RAM-DSIR code.

    Raises:
        FedsgcgError: DAT-103 when it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("L"))
    # Damaged bytes raise nearly any exception, and one file must not stop the others.
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise fail("DAT-103", found=found, action="Get the file again.", where=str(path)) from error


# the released layout


def _released_root(files: Sequence[Path]) -> Path | None:
    """Return the parent folder of Domain1 to Domain4; None when no file is in such a folder."""
    for path in files:
        for parent in path.parents:
            in_part = any(path.is_relative_to(parent / part) for part in PARTS)
            if parent.name in DOMAINS and in_part:
                return parent.parent
    return None


def _released(root: Path, files: Sequence[Path], *, link: bool) -> Found:
    found = Found(f"released crops, Domain1 to Domain4 in {root}")
    present = set(files)
    for domain in DOMAINS:
        for part in PARTS:
            pairs, from_list = _listed_pairs(root, domain, part, files)
            if from_list is not None:
                count = number_of(len(pairs), "case")
                found.notes.append(f"{domain} {part}: {count} as listed in {from_list.name}")
            for image, mask in pairs:
                gone = [path for path in (image, mask) if path not in present]
                for path in gone:
                    found.missing(path, "such file")
                    found.torn |= {image, mask} - set(gone)
                if not gone:
                    make = partial(_make_released, image, mask, link)
                    found.work.append(_work(domain, part, image.stem, (image, mask), make))
    found.extras(files)
    return found


def _listed_pairs(
    root: Path, domain: str, part: str, files: Sequence[Path]
) -> tuple[list[tuple[Path, Path]], Path | None]:
    """Return the (image, mask) pairs of a part, and the list file that names them.

    Without a list file the pairs are those of the published names. The published code of RAM-DSIR
    has lists next to the domain folders with paths from there, and lists within a domain folder
    with paths from that folder.
    """
    for path in (root / f"{domain}_{part}.list", root / domain / f"{part}.list"):
        if path.is_file():
            return _pairs_of_list(root, domain, path), path
    images = root / domain / part / "ROIs" / "image"
    masks = root / domain / part / "ROIs" / "mask"
    image_suffixes = {path.stem: path.suffix for path in files if path.parent == images}
    mask_suffixes = {path.stem: path.suffix for path in files if path.parent == masks}
    pairs = []
    for name in sorted(PUBLISHED[domain, part]):
        image = images / (name + image_suffixes.get(name, ".png"))
        mask = masks / (name + mask_suffixes.get(name, ".png"))
        pairs.append((image, mask))
    return pairs, None


def _pairs_of_list(root: Path, domain: str, path: Path) -> list[tuple[Path, Path]]:
    """Return the (image, mask) pairs of a list file; raises DAT-120 for a malformed line."""
    text = path.read_text(encoding="utf-8-sig")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    for number, names in enumerate(lines, 1):
        if len(names) != 2:
            raise fail(
                "DAT-120",
                where=str(path),
                found=f"line {number} does not have two paths",
                expected="image and mask, separated by a space",
            )
    return [(_file_of(root, domain, image), _file_of(root, domain, mask)) for image, mask in lines]


def _file_of(root: Path, domain: str, text: str) -> Path:
    """Return the file for a path of a list.

    A path that leads out of the root folder is replaced by a file of the domain's folder.
    """
    text = text.replace("\\", "/").lstrip("/")
    if ".." in Path(text).parts:
        return root / domain / Path(text).name
    candidates = [root / text, root / domain / text]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _make_released(image: Path, mask: Path, link: bool, to_image: Path, to_mask: Path) -> str:
    pixels = _pixels(image)
    labels = labels_of(grey_values(mask))
    _check_pair(pixels, labels, image)
    if image.suffix.lower() == ".png":
        copy_or_link(image, to_image, link=link)
    else:
        to_image.write_bytes(picture_bytes(pixels))
    to_mask.write_bytes(mask_bytes(labels))
    if labels.shape == (SIDE, SIDE):
        return ""
    return f"{labels.shape[1]} x {labels.shape[0]} pixels, not {SIDE} x {SIDE}"


# the original releases


def _original_index(files: Sequence[Path]) -> dict[tuple[str, str], list[tuple[str, Path]]]:
    """Return (domain, kind) -> (published case name, file) of each file."""
    numbers = {name[-3:]: name for part in PARTS for name in PUBLISHED["Domain1", part]}
    index: dict[tuple[str, str], list[tuple[str, Path]]] = {
        (domain, kind): [] for domain, kind, _ in ORIGINALS
    }
    for path in files:
        for domain, kind, pattern in ORIGINALS:
            if match := pattern.fullmatch(path.name):
                case = match["case"]
                if domain == "Domain1":
                    case = numbers.get(case[-3:], case)
                index[domain, kind].append((case, path))
                break
    return index


def _original(
    source: Path,
    files: Sequence[Path],
    index: dict[tuple[str, str], list[tuple[str, Path]]],
) -> Found:
    found = Found(f"original releases in {source}, cropped to {SIDE} x {SIDE} around the disc")
    found.notes += [
        "crops are centred on the disc's bounding box; the released crops were made by another "
        "program, so they differ by a few pixels",
        "Drishti-GS: a pixel is marked if all experts marked it (soft map 255), as in the "
        "published crops; RIM-ONE r3: left half of the stereo picture, average of the two experts",
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
                present = tuple(path for path in paths if path is not None)
                if len(present) != len(kinds):
                    found.torn |= set(present)
                else:
                    make = partial(_make_original, domain, present)
                    found.work.append(_work(domain, part, case, present, make))
    found.extras(files, lambda path: bool(UNUSED.fullmatch(path.name)))
    return found


def _one_each(found: Found, files: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Return one file per case; a second file of the same name is surplus."""
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
    """Return the columns of a stereo picture's left half; all columns if it is taller than wide."""
    return shape[1] // 2 if shape[1] > shape[0] else shape[1]


def _marked(path: Path, columns: int, limit: int) -> NDArray[np.bool_]:
    """Return where the first columns of a map exceed a grey value."""
    return grey_values(path)[:, :columns] > limit


# both layouts


def _work(
    domain: str,
    part: str,
    case: str,
    sources: tuple[Path, ...],
    make: Any,
) -> Work:
    suffixes = (".png", ".png")
    return Work(domain, case, sources, suffixes, make, patient=case, split=part, published=part)


def _with_validation(work: Sequence[Work], fraction: float) -> list[Work]:
    """Keep a share of each hospital's published training part for source validation."""
    training: dict[str, list[str]] = defaultdict(list)
    for one in work:
        if one.split == "train":
            training[one.site].append(one.patient)
    chosen = {site: validation_patients(ids, fraction) for site, ids in training.items()}
    return [
        replace(one, split="validation")
        if one.split == "train" and one.patient in chosen[one.site]
        else one
        for one in work
    ]


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
    """Check that a mask has the size of its image (DAT-104) and contains a disc (DAT-125)."""
    if pixels.shape[:2] != labels.shape:
        found = f"{labels.shape[1]}x{labels.shape[0]}"
        expected = f"{pixels.shape[1]}x{pixels.shape[0]}"
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
            found="a mask without a disc",
            expected="a disc",
            action="Check the mask.",
            where=str(path),
        )
