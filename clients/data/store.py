"""The cases of one hospital, read once from its image files and then only from a memory-mapped Arrow file.

One Arrow IPC file a site, uncompressed, one record batch a case (usable or not), so that opening it reads no pixel and
a training step copies just the slices it needs. The file's name is a BLAKE2b key over the bytes of all image and mask
files and the settings that shape a slice: a changed file or setting makes a new cache file, roles and splits do not.
A volume's slices are stored once; three-slice stacks (z-1, z, z+1, the outermost slice repeated) are put together in
a batch.

Legend: B slices of a batch, N of a table, C = 3 channels, S = image_size; Z, Y, X = native slices, rows, columns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clients.data.cache import (
    cache_error,
    digest,
    file_hashes,
    hash_memo,
    locked,
    prune,
    touch_used,
)
from clients.data.case_files import CaseFile, Site, open_site, splits
from clients.data.slices import STEPS, Slices, prepare
from common.errors import FedsgcgError, Problem, fail
from common.images.read import KINDS, PICTURE
from common.settings.plan import DataSettings

CHANNELS = 3
# Part of the key: raise it when the meaning of a stored slice changes.
FORMAT = 4
ARRAYS = tuple(
    field.name for field in fields(Slices) if field.name not in ("spacing", "kind", "content")
)
# `case`: JSON with the case's facts or its problem; then the arrays of `Slices`, as bytes.
SCHEMA = pa.schema([("case", pa.string()), *((name, pa.large_binary()) for name in ARRAYS)])


@dataclass(frozen=True)
class Case:
    """One usable case.

    Attributes:
        index: Position in `CaseStore.cases`.
        name: The site's own name of the case; never leaves the site.
        alias: Name under which its results may leave; cannot be computed without the image file, nor, at a site with
            a policy, without the site's secret salt.
        patient: The patient's id; never leaves the site.
        split: `train`, `validation` or `test`.
        num_slices: Z; 1 for a picture.
        native_shape: (Z, Y, X) of the file in canonical orientation.
        spacing: (sz, sy, sx) in mm; None for a picture and where the header gives no size.
        is_picture: Whether the case is a 2-D picture.
        has_foreground: Whether the mask holds a declared structure.
        content: Hash of the image's voxels (`common.images.contents`); leaves only salted, and only where the site
            allows it.
    """

    index: int
    name: str
    alias: str
    patient: str
    split: str
    num_slices: int
    native_shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    is_picture: bool
    has_foreground: bool
    content: str = ""


@dataclass(frozen=True)
class SliceTable:
    """Some slices of a store, as training and evaluation see them.

    Attributes:
        case_of: (N,) index of the case of each slice.
        z_of: (N,) position of each slice in its case.
        has_foreground: (N,) whether the slice holds a declared structure.
        stack_size: 3 = neighbours as channels, 1 = the slice repeated.
        stored: The arrays of every case of the store, by case index.
    """

    case_of: NDArray[np.int64]
    z_of: NDArray[np.int64]
    has_foreground: NDArray[np.bool_]
    stack_size: int
    stored: Sequence[Slices]

    def __len__(self) -> int:
        return len(self.case_of)

    def stack(
        self, indices: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return images (B, C, S, S) float32 in [-1, 1] and labels (B, S, S) uint8 class indices of some slices."""
        chosen = np.asarray(indices, dtype=np.int64)
        side = self.stored[0].label.shape[-1]
        images = np.empty((len(chosen), CHANNELS, side, side), np.float32)
        labels = np.empty((len(chosen), side, side), np.uint8)
        for row, index in enumerate(chosen):
            case, z = self.stored[self.case_of[index]], int(self.z_of[index])
            np.multiply(self._channels(case.image, z), np.float32(1 / STEPS), out=images[row])
            labels[row] = case.label[z]
        return images, labels

    def only(self, keep: NDArray[np.bool_]) -> SliceTable:
        """Return the slices where `keep` (N,) is true; their stacks stay the same."""
        return SliceTable(
            self.case_of[keep],
            self.z_of[keep],
            self.has_foreground[keep],
            self.stack_size,
            self.stored,
        )

    def _channels(self, image: NDArray[np.int16], z: int) -> NDArray[np.int16]:
        """Return the (C, S, S) channels of slice z: colours, or the stack about it."""
        if image.shape[1] == CHANNELS:
            return np.asarray(image[z])
        reach = 1 if self.stack_size == 3 else 0
        return np.asarray(image[np.clip([z - reach, z, z + reach], 0, len(image) - 1), 0])


@dataclass(frozen=True)
class CaseStore:
    """The usable cases of a site, memory-mapped.

    Attributes:
        site: Name of the hospital.
        cases: Usable cases, sorted by name.
        problems: What was left out, and empty masks, which are kept. `where` is a case name: stays here.
        data: The settings the slices were made with.
        stored: The arrays of each case.
        kind: What all its cases are, one of `common.images.read.KINDS`.
        key: Content key of the site's files and of the settings that shape a slice; names the cache file.
    """

    site: str
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]
    data: DataSettings
    stored: tuple[Slices, ...]
    key: str
    kind: str = KINDS[0]

    def slices(self, split: str) -> SliceTable:
        """Return the slices of a split; of `train` only those with a structure when `data.train_slices` says so."""
        chosen = [case for case in self.cases if case.split == split]
        numbers = np.array([case.index for case in chosen], dtype=np.int64)
        counts = np.array([case.num_slices for case in chosen], dtype=np.int64)
        z_of = np.concatenate([np.zeros(0, np.int64), *(np.arange(count) for count in counts)])
        shown = [_shown(self.stored[case.index], self.data) for case in chosen]
        foreground = np.concatenate([np.zeros(0, np.bool_), *shown])
        table = SliceTable(
            np.repeat(numbers, counts), z_of, foreground, self.data.stack, self.stored
        )
        return (
            table.only(foreground)
            if split == "train" and self.data.train_slices == "foreground"
            else table
        )

    def truth(self, case: Case) -> NDArray[np.uint8]:
        """Return the (Z, Y, X) class indices of a case on its native grid."""
        return self.stored[case.index].truth

    def image(self, case: Case) -> NDArray[np.float32]:
        """Return the (Z, Y, X) native image of a case in [0, 1] for display; colours become grey."""
        return np.asarray(self.stored[case.index].display, dtype=np.float32) / np.float32(255)


def open_store(
    site: Site, data: DataSettings, cache: Path, *, heldout: bool, salt: bytes = b""
) -> CaseStore:
    """Open the slices of a site; reads the image files only when they or the settings have changed.

    Args:
        site: The hospital's files.
        data: Settings that shape a slice.
        cache: Cache folder of the site.
        heldout: Whether the site is only evaluated: its cases are `test` cases.
        salt: The site's secret for aliases (32 bytes); without one an alias follows from the image file.

    Raises:
        FedsgcgError: DAT-102 when no case is usable, followed by the problem of every case; DAT-113 when the cache
            cannot be written or read.
    """
    files = {file.name: file for file in site.cases}
    key, rows = _cached(site, data, cache)
    broken = [Problem(**facts["problem"]) for facts, _ in rows if "problem" in facts]
    good = [(facts, slices) for facts, slices in rows if slices is not None]
    kind, good, others = _one_kind(good)
    empty = {facts["name"] for facts, slices in good if not _shown(slices, data).any()}
    good, copies = _once(good, empty)
    flagged = (_empty_mask(facts["name"]) for facts, _ in good if facts["name"] in empty)
    problems = (*site.quarantined, *broken, *others, *flagged, *copies)
    chosen = splits(
        [files[facts["name"]] for facts, _ in good], data.validation_fraction, heldout=heldout
    )
    if not good or (heldout and "test" not in chosen):
        raise FedsgcgError(_nothing(site, len(good)), *problems)
    cases = tuple(
        _case(
            index,
            facts | {"alias": salted(facts["alias"], salt)},
            slices,
            files[facts["name"]],
            split,
            data,
        )
        for index, ((facts, slices), split) in enumerate(zip(good, chosen, strict=True))
    )
    return CaseStore(
        site.name, cases, problems, data, tuple(slices for _, slices in good), key, kind
    )


def main_kind(kinds: Sequence[str]) -> str:
    """Return what most cases are; of equally many the first of `common.images.read.KINDS`."""
    counts = Counter(kinds)
    return max(KINDS, key=lambda one: (counts[one], -KINDS.index(one)))


def other_kind(case: str, kind: str, wanted: str) -> Problem:
    """Return the problem of a case that is left out because most cases are of another kind."""
    action = "Put it into a data set of its own, or resample the volume to slices of that plane."
    return Problem(
        "DAT-117", f"a case of kind {kind}", f"{wanted}, as most cases are", action, where=case
    )


def _once(rows: Sequence[Usable], empty: Collection[str]) -> tuple[list[Usable], list[Problem]]:
    """Keep one case of every image; a copy would count twice, and might test what the other one trained.

    A case with a structure is kept before one whose mask is `empty`.
    """
    first: dict[str, str] = {}
    for facts, slices in sorted(rows, key=lambda row: row[0]["name"] in empty):
        first.setdefault(slices.content or facts["name"], facts["name"])
    kept, problems = [], []
    for facts, slices in rows:
        name = first[slices.content or facts["name"]]
        if name == facts["name"]:
            kept.append((facts, slices))
        else:
            found, action = f"the same image as {name}", "It is left out; remove one of the two."
            problems.append(
                Problem("SITE-511", found, "each image once", action, where=facts["name"])
            )
    return kept, problems


def salted(alias: str, salt: bytes) -> str:
    """Return an alias that nobody can compute without the site's salt; with an empty salt it stays as it is."""
    return hashlib.blake2b(alias.encode(), digest_size=5, key=salt).hexdigest() if salt else alias


def fingerprint(store: CaseStore) -> str:
    """Return a short hex digest of what a site trains and is judged on: its files' content and its splits.

    It depends on no path and no machine, so that the coordinator can notice that a site's data changed within a run.
    """
    assigned = [[case.name, case.patient, case.split] for case in store.cases]
    return digest(json.dumps([store.key, assigned]).encode(), 8)


def data_fingerprint(root: Path, sites: Sequence[str], data: DataSettings, cache: Path) -> str:
    """Return a hex digest of the content and the listing of some sites' files, without building their cache.

    Args:
        root: Data root.
        sites: Names of the hospitals; their order does not matter.
        data: Settings with which the sites are opened.
        cache: Cache folder, which remembers the hashes of files that did not change.

    Raises:
        FedsgcgError: DAT-101 or DAT-102 when a site cannot be listed, DAT-113 when the cache cannot be written.
    """
    listed: list[object] = []
    for name in sorted(sites):
        site = open_site(root, name, data)
        hashes = file_hashes(_files(site), hash_memo(cache, name))
        left_out = [
            [problem.code, problem.where.removeprefix(str(root))] for problem in site.quarantined
        ]
        listed.append([name, left_out])
        for case in site.cases:
            mask = hashes[case.mask] if case.mask else ""
            listed.append([case.name, case.patient, case.split, hashes[case.image], mask])
    return digest(json.dumps(listed).encode(), 16)


def _shown(slices: Slices, data: DataSettings) -> NDArray[np.bool_]:
    """Return for each slice (Z,) whether it holds a class of a declared structure."""
    classes = sorted({index for group in data.structure_classes().values() for index in group})
    return np.asarray(slices.present[:, classes].any(axis=1))


def _case(
    index: int,
    facts: dict[str, Any],
    slices: Slices,
    file: CaseFile,
    split: str,
    data: DataSettings,
) -> Case:
    """Return what is known of a case without its pixels."""
    z, y, x = slices.truth.shape
    return Case(
        index=index,
        name=file.name,
        alias=facts["alias"],
        patient=file.patient,
        split=split,
        num_slices=z,
        native_shape=(z, y, x),
        spacing=slices.spacing,
        is_picture=slices.kind == PICTURE,
        has_foreground=bool(_shown(slices, data).any()),
        content=slices.content,
    )


def _nothing(site: Site, usable: int) -> Problem:
    """Return the problem of a site that has no case for its role."""
    if usable:
        found, action = (
            f"{usable} cases, none in the test split",
            "Give the manifest's split column test cases.",
        )
    else:
        found, action = (
            "every case is left out",
            "The problems of the cases follow; mend at least one.",
        )
    return Problem("DAT-102", found, "at least one usable case", action, where=site.name)


def _empty_mask(name: str) -> Problem:
    """Return the remark on a mask without a structure: a healthy patient, a true negative, or a mask never drawn."""
    action = "Trained on and evaluated as a case without the structure; if the mask was never drawn, leave the case out."
    return Problem(
        "DAT-110", "no declared structure", "at least one in most cases", action, where=name
    )


Usable = tuple[dict[str, Any], Slices]
Row = tuple[dict[str, Any], Slices | None]


def _one_kind(good: Sequence[Usable]) -> tuple[str, list[Usable], list[Problem]]:
    """Return the kind that most cases are, the cases of it, and a problem for each other one.

    Slices of different planes, and pictures among volumes, look different: one network does not learn both from a few.
    """
    kind = main_kind([slices.kind for _, slices in good])
    others = [
        other_kind(facts["name"], slices.kind, kind)
        for facts, slices in good
        if slices.kind != kind
    ]
    return kind, [row for row in good if row[1].kind == kind], others


def _files(site: Site) -> list[Path]:
    """Return all image and mask files of a site."""
    return [path for case in site.cases for path in (case.image, case.mask) if path is not None]


def _cached(site: Site, data: DataSettings, cache: Path) -> tuple[str, list[Row]]:
    """Return the key and the rows of the site's cache file, which is built first when it is missing or damaged."""
    hashes = file_hashes(_files(site), hash_memo(cache, site.name))
    key = _key(site, data, hashes)
    path = cache / "slices" / f"{key}.arrow"
    damage = ""
    for _ in range(2):
        if damage or not path.is_file():
            with locked(path.with_suffix(".lock")):
                # Another process may have built it while this one waited.
                if damage or not path.is_file():
                    _build(site, data, hashes, path)
                    prune(cache)
        try:
            rows = _open(path)
            touch_used(path)
            return key, rows
        except (pa.ArrowInvalid, OSError, ValueError, KeyError) as error:
            damage = f"{type(error).__name__}: {error}"
    raise fail(
        "DAT-113",
        found=damage,
        expected="a readable cache",
        action="Delete the file.",
        where=str(path),
    )


def _key(site: Site, data: DataSettings, hashes: dict[Path, str]) -> str:
    """Return the name of the cache file: the files' content and every setting that shapes a slice."""
    settings = [
        FORMAT,
        data.image_size,
        data.intensity,
        data.label_tolerance,
        list(data.classes.values()),
    ]
    files = [
        [case.name, hashes[case.image], hashes[case.mask] if case.mask else ""]
        for case in site.cases
    ]
    return digest(json.dumps([site.name, settings, files]).encode(), 16)


def _build(site: Site, data: DataSettings, hashes: dict[Path, str], path: Path) -> None:
    """Read every case once and write the cache file; a case that cannot be used is written as its problem."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for case in site.cases:
                writer.write_batch(_record(case, data, hashes))
        os.replace(temporary, path)
    except OSError as error:
        raise cache_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _record(case: CaseFile, data: DataSettings, hashes: dict[Path, str]) -> pa.RecordBatch:
    """Return the record batch of one case."""
    facts: dict[str, Any] = {"name": case.name}
    try:
        slices = prepare(case, data)
        arrays = [np.ascontiguousarray(getattr(slices, name)) for name in ARRAYS]
        facts["alias"] = digest(json.dumps([case.site, case.name, hashes[case.image]]).encode(), 5)
        facts["spacing"], facts["kind"], facts["content"] = (
            slices.spacing,
            slices.kind,
            slices.content,
        )
        facts["shapes"] = [array.shape for array in arrays]
        facts["types"] = [array.dtype.str for array in arrays]
    except FedsgcgError as error:
        facts["problem"] = asdict(error.problems[0]) | {"where": case.name}
        arrays = [np.zeros(0, np.uint8) for _ in ARRAYS]
    columns = [[json.dumps(facts)], *([array.tobytes()] for array in arrays)]
    types = [field.type for field in SCHEMA]
    return pa.record_batch(
        [pa.array(*pair) for pair in zip(columns, types, strict=True)], schema=SCHEMA
    )


def _open(path: Path) -> list[Row]:
    """Map a cache file and return its rows, without reading a pixel."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [_row(reader.get_batch(number)) for number in range(reader.num_record_batches)]


def _row(batch: pa.RecordBatch) -> Row:
    """Return the facts of one record batch and, of a usable case, views of its arrays."""
    facts = json.loads(batch.column(0)[0].as_py())
    if "problem" in facts:
        return facts, None
    arrays = {}
    for number, name in enumerate(ARRAYS):
        flat = np.frombuffer(
            batch.column(number + 1)[0].as_buffer(), np.dtype(facts["types"][number])
        )
        arrays[name] = flat.reshape(facts["shapes"][number])
        # The file is mapped for reading; writing to it would kill the process.
        arrays[name].flags.writeable = False
    spacing = tuple(facts["spacing"]) if facts["spacing"] else None
    return facts, Slices(**arrays, spacing=spacing, kind=facts["kind"], content=facts["content"])
