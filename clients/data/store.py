"""The cases of one hospital, read once from image files and then from a memory-mapped cache.

The cache is an uncompressed Arrow IPC file per site with one record batch per case (usable or not).
Opening it reads no pixels, and a training step copies only the slices it needs. The file is named
after a BLAKE2b key over the bytes of all image and mask files and the settings that affect slices,
so a changed file or setting creates a new cache file; roles and splits do not affect it. A volume's
slices are stored once; stacks of three slices (z-1, z, z+1, with the outermost slice repeated) are
composed when a batch is read.

Legend: B slices of a batch, N of a table, C = 3 channels, S = image_size; Z, Y, X = native slices,
rows, columns.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedsgcg.clients.data.cache import (
    BEYOND,
    UNLIMITED,
    Budget,
    cache_error,
    digest,
    file_hashes,
    hash_memo,
    locked,
    make_room,
    prune,
    touch_used,
)
from fedsgcg.clients.data.case_files import CaseFile, Site, content_of, open_site, splits
from fedsgcg.clients.data.slices import STEPS, Slices, prepare
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.atomic import replaced
from fedsgcg.common.images.formats import DICOM, FORMATS
from fedsgcg.common.images.read import KINDS, PICTURE, suffix_of
from fedsgcg.common.names import number_of
from fedsgcg.common.networks import IN_CHANNELS
from fedsgcg.common.settings.data import channels_of
from fedsgcg.common.settings.plan import DataSettings

# Part of the key: increase it when the meaning of a stored slice changes.
FORMAT = 5
# Suffixes of masks whose values are labels; a DICOM segmentation has names.
LABEL_MAPS = {suffix for form in FORMATS if form is not DICOM for suffix in form.suffixes}
ARRAYS = tuple(
    field.name for field in fields(Slices) if field.name not in ("spacing", "kind", "content")
)
# `case`: JSON with the case's facts or its problem. The other columns: the arrays of `Slices` as
# bytes.
SCHEMA = pa.schema([("case", pa.string()), *((name, pa.large_binary()) for name in ARRAYS)])


@dataclass(frozen=True)
class Case:
    """One usable case.

    Attributes:
        index: Position in `CaseStore.cases`.
        name: The site's own name for the case; never leaves the site.
        alias: Name under which its results may leave the site. It cannot be computed without the
            image file or, at a site with a policy, without the site's secret salt.
        patient: The patient's id; never leaves the site.
        split: `train`, `validation` or `test`.
        num_slices: Z; 1 for a picture.
        native_shape: (Z, Y, X) of the file in canonical orientation.
        spacing: (sz, sy, sx) in mm; None for a picture or if the header has no voxel size.
        is_picture: Whether the case is a 2-D picture.
        has_foreground: Whether the mask contains a declared structure.
        content: Hash of the image's voxels (`common.images.contents`); it leaves the site only
            salted, and only if the site allows it.
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
        case_of: (N,) case index of each slice.
        z_of: (N,) position of each slice in its case.
        has_foreground: (N,) whether a slice contains a declared structure.
        stack_size: 3 or 5 = adjacent slices as channels, 1 = the slice repeated.
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
        """Return images (B, C, S, S) float32 in [-1, 1] and labels (B, S, S) uint8."""
        chosen = np.asarray(indices, dtype=np.int64)
        side = self.stored[0].label.shape[-1]
        labels = np.empty((len(chosen), side, side), np.uint8)
        for row, index in enumerate(chosen):
            labels[row] = self.stored[self.case_of[index]].label[int(self.z_of[index])]
        return self.images(self.case_of[chosen], self.z_of[chosen]), labels

    def images(self, cases: NDArray[np.int64], z: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return images (B, C, S, S) float32 in [-1, 1] of slices z (B,) of cases (B,)."""
        side = self.stored[0].label.shape[-1]
        channels = channels_of(self.stack_size)
        images = np.empty((len(cases), channels, side, side), np.float32)
        for row, (case, position) in enumerate(zip(cases, z, strict=True)):
            stacked = self._channels(self.stored[case].image, int(position))
            np.multiply(stacked, np.float32(1 / STEPS), out=images[row])
        return images

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
        """Return the (C, S, S) channels of slice z: colours, or the stack around it."""
        if image.shape[1] == IN_CHANNELS:
            return np.asarray(image[z])
        reach = self.stack_size // 2
        around = z + np.arange(-reach, reach + 1) if reach else np.full(IN_CHANNELS, z)
        return np.asarray(image[np.clip(around, 0, len(image) - 1), 0])


@dataclass(frozen=True)
class CaseStore:
    """The usable cases of a site, memory-mapped.

    Attributes:
        site: Name of the hospital.
        cases: Usable cases, sorted by name.
        problems: Problems of cases that were left out, and of empty masks, which are kept. `where`
            is a case name and never leaves the site.
        data: The settings of the slices.
        stored: The arrays of each case.
        kind: Kind of all its cases, one of `common.images.read.KINDS`.
        key: Content key of the site's files and of the settings that affect slices; names the cache
            file.
        labelled: Whether the masks of its training cases were read.
    """

    site: str
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]
    data: DataSettings
    stored: tuple[Slices, ...]
    key: str
    kind: str = KINDS[0]
    labelled: bool = True

    @property
    def has_colour(self) -> bool:
        """Whether a picture has three channels."""
        return any(slices.image.shape[1] == IN_CHANNELS for slices in self.stored)

    def slices(self, split: str) -> SliceTable:
        """Return the slices of a split.

        With `data.train_slices=foreground`, `train` has only slices with a structure; all slices at
        a site without masks, which cannot know.
        """
        chosen = [case for case in self.cases if case.split == split]
        numbers = np.array([case.index for case in chosen], dtype=np.int64)
        counts = np.array([case.num_slices for case in chosen], dtype=np.int64)
        z_of = np.concatenate([np.zeros(0, np.int64), *(np.arange(count) for count in counts)])
        shown = [_has_structure(self.stored[case.index], self.data) for case in chosen]
        foreground = np.concatenate([np.zeros(0, np.bool_), *shown])
        table = SliceTable(
            np.repeat(numbers, counts), z_of, foreground, self.data.stack, self.stored
        )
        if split == "train" and self.data.train_slices == "foreground" and self.labelled:
            return table.only(foreground)
        return table

    def truth(self, case: Case) -> NDArray[np.uint8]:
        """Return the (Z, Y, X) class indices of a case on its native grid."""
        return self.stored[case.index].truth

    def image(self, case: Case) -> NDArray[np.float32]:
        """Return the native image (Z, Y, X) in [0, 1] for display; (Z, Y, X, 3) in colour."""
        return np.asarray(self.stored[case.index].display, dtype=np.float32) / np.float32(255)


def open_store(
    site: Site,
    data: DataSettings,
    cache: Path,
    *,
    heldout: bool,
    salt: bytes = b"",
    budget: Budget = UNLIMITED,
    split_salt: bytes = b"",
    target: bool = False,
    masks: bool = True,
) -> CaseStore:
    """Open the slices of a site; image files are read only if they or the settings have changed.

    Args:
        site: The hospital's files.
        data: Settings that affect slices.
        cache: Cache folder of the site.
        heldout: Whether the site is only evaluated, so that its cases are `test` cases.
        salt: The site's secret for aliases (32 bytes); without it an alias is a digest of the image
            file.
        budget: Disk and memory that may be used to build the cache.
        split_salt: The site's secret for the split of its patients (32 bytes).
        target: Whether the hospital is one of `unlabelled`: it has no validation cases.
        masks: Whether the site was opened with its masks (`open_site`).

    Raises:
        FedsgcgError: POL-707 when the cache would exceed the budget; DAT-102 when no case is
            usable, followed by the problems of the cases; DAT-113 when the cache cannot be written
            or read; DAT-130 for pictures with a stack of more slices than they have channels.
    """
    files = {file.name: file for file in site.cases}
    key, rows = _cached(site, data, cache, budget, masks)
    broken = [Problem(**facts["problem"]) for facts, _ in rows if "problem" in facts]
    good = [(facts, slices) for facts, slices in rows if slices is not None]
    kind, good, others = _keep_main_kind(good)
    if good and kind == PICTURE and data.in_channels > IN_CHANNELS:
        raise fail(
            "DAT-130",
            found=f"data.stack={data.stack} for pictures, which have {IN_CHANNELS} channels",
            expected="data.stack=1 or 3",
            action="Leave data.stack out: a picture has no neighbouring slices.",
            where=site.name,
        )
    empty = {
        facts["name"]
        for facts, slices in good
        if files[facts["name"]].mask and not _has_structure(slices, data).any()
    }
    good, copies = _without_duplicates(good, empty)
    flagged = (_empty_mask(facts["name"]) for facts, _ in good if facts["name"] in empty)
    problems = (*site.quarantined, *broken, *others, *flagged, *copies)
    chosen = splits(
        [files[facts["name"]] for facts, _ in good],
        data.validation_fraction,
        heldout=heldout,
        salt=split_salt,
        target=target,
        rule=data.split,
    )
    if not good or (heldout and "test" not in chosen):
        raise FedsgcgError(_no_case(site, len(good)), *problems)
    cases = tuple(
        _case(
            index,
            facts | {"alias": salted_alias(facts["alias"], salt)},
            slices,
            files[facts["name"]],
            split,
            data,
        )
        for index, ((facts, slices), split) in enumerate(zip(good, chosen, strict=True))
    )
    return CaseStore(
        site.name, cases, problems, data, tuple(slices for _, slices in good), key, kind, masks
    )


def main_kind(kinds: Sequence[str]) -> str:
    """Return the most frequent kind; in a tie, the first of `common.images.read.KINDS`."""
    counts = Counter(kinds)
    return max(KINDS, key=lambda one: (counts[one], -KINDS.index(one)))


def other_kind_problem(case: str, kind: str, wanted: str) -> Problem:
    """Return the problem of a case that is left out because most cases have another kind."""
    action = "Move it to another data set, or resample the volume to slices of that plane."
    return Problem(
        "DAT-117", f"a case of kind {kind}", f"{wanted}, like most cases", action, where=case
    )


def _without_duplicates(
    rows: Sequence[Usable], empty: Collection[str]
) -> tuple[list[Usable], list[Problem]]:
    """Keep one case per image, because a copy might be in another split.

    A case with a structure is preferred to one whose mask is `empty`.
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
            found = f"the same image as {name}"
            action = "The case is left out; remove one of the two."
            problems.append(
                Problem("SITE-511", found, "each image once", action, where=facts["name"])
            )
    return kept, problems


def salted_alias(alias: str, salt: bytes) -> str:
    """Return an alias that cannot be computed without the site's salt.

    With an empty salt the alias is returned unchanged.
    """
    return hashlib.blake2b(alias.encode(), digest_size=5, key=salt).hexdigest() if salt else alias


def fingerprint(store: CaseStore) -> str:
    """Return a short hex digest of a site's data: the content of its files and its splits.

    It is independent of paths and machines.
    """
    assigned = [[case.name, case.patient, case.split] for case in store.cases]
    return digest(json.dumps([store.key, assigned]).encode(), 8)


def data_fingerprint(
    root: Path, sites: Sequence[str], data: DataSettings, cache: Path, hidden: Collection[str] = ()
) -> str:
    """Return a hex digest of some sites' files and their listing, without building a cache.

    Args:
        root: Data root.
        sites: Names of the hospitals; their order does not matter.
        data: Settings with which the sites are opened.
        cache: Cache folder, which stores the hashes of unchanged files.
        hidden: Hospitals whose masks are not read.

    Raises:
        FedsgcgError: DAT-101 or DAT-102 when a site cannot be listed, DAT-113 when the cache cannot
            be written.
    """
    listed: list[object] = []
    for name in sorted(sites):
        site = open_site(root, name, data, masks=name not in hidden)
        hashes = file_hashes(_files(site), hash_memo(cache, name))
        left_out = [
            [problem.code, problem.where.removeprefix(str(root))] for problem in site.quarantined
        ]
        listed.append([name, left_out])
        for case in site.cases:
            contents = [content_of([case.image], hashes), content_of(case.masks, hashes)]
            listed.append([case.name, case.patient, case.split, *contents])
    return digest(json.dumps(listed).encode(), 16)


def _has_structure(slices: Slices, data: DataSettings) -> NDArray[np.bool_]:
    """Return for each slice (Z,) whether it contains a declared structure."""
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
    """Return the description of a case."""
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
        has_foreground=bool(_has_structure(slices, data).any()),
        content=slices.content,
    )


def _no_case(site: Site, usable: int) -> Problem:
    """Return the problem of a site that has no case for its role."""
    if usable:
        found = f"{number_of(usable, 'case')}, none in the test split"
        action = "Assign cases to the test split in the manifest."
    else:
        found = "every case is left out"
        action = "The problems of the cases follow; fix at least one."
    return Problem("DAT-102", found, "at least one usable case", action, where=site.name)


def _empty_mask(name: str) -> Problem:
    """Return the note about a mask without a structure, which may be right or not drawn."""
    action = (
        "The case is trained on and evaluated without the structure; if its mask was never drawn, "
        "leave the case out."
    )
    return Problem(
        "DAT-110", "no declared structure", "at least one in most cases", action, where=name
    )


Usable = tuple[dict[str, Any], Slices]
Row = tuple[dict[str, Any], Slices | None]


def _keep_main_kind(good: Sequence[Usable]) -> tuple[str, list[Usable], list[Problem]]:
    """Return the most frequent kind, its cases, and a problem for each other case.

    Slices of different planes, or pictures and volumes, look too different for a network to learn
    from few cases.
    """
    kind = main_kind([slices.kind for _, slices in good])
    others = [
        other_kind_problem(facts["name"], slices.kind, kind)
        for facts, slices in good
        if slices.kind != kind
    ]
    return kind, [row for row in good if row[1].kind == kind], others


def _files(site: Site) -> list[Path]:
    """Return all image and mask files of a site."""
    return [path for case in site.cases for path in case.files()]


def _cached(
    site: Site, data: DataSettings, cache: Path, budget: Budget, masks: bool
) -> tuple[str, list[Row]]:
    """Return key and rows of the site's cache file; build it if it is missing or damaged."""
    hashes = file_hashes(_files(site), hash_memo(cache, site.name))
    key = _key(site, data, hashes, masks)
    path = cache / "slices" / f"{key}.arrow"
    damage = ""
    for _ in range(2):
        if damage or not path.is_file():
            with locked(path.with_suffix(".lock")):
                # Another process may have built the file while this one waited.
                if damage or not path.is_file():
                    _build(site, data, hashes, path, budget, masks)
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


def _key(site: Site, data: DataSettings, hashes: dict[Path, str], masks: bool) -> str:
    """Return the key of the cache file: a digest of the files' content and of the settings."""
    settings: list[Any] = [
        FORMAT,
        data.image_size,
        data.intensity,
        data.label_tolerance,
        list(data.classes.values()),
        *([data.flat_sigma] if data.intensity == "flat" else []),
    ]
    if data.aspect != "squeeze" or data.spacing:
        settings += [data.aspect, data.spacing, data.spacing_unit]
    files = [
        [case.name, content_of([case.image], hashes), content_of(case.masks, hashes)]
        for case in site.cases
    ]
    # Masks by structure have a meaning only with the names of classes and structures.
    named = [[case.name, case.structure_names] for case in site.cases if case.structures]
    if named or any(suffix_of(mask) not in LABEL_MAPS for one in site.cases for mask in one.masks):
        settings += [named, list(data.classes), data.structures]
    stated = [site.name, settings, files, *([] if masks else ["without masks"])]
    return digest(json.dumps(stated).encode(), 16)


def _build(
    site: Site,
    data: DataSettings,
    hashes: dict[Path, str],
    path: Path,
    budget: Budget,
    masks: bool,
) -> None:
    """Read every case and write the cache file; an unusable case is stored as its problem."""
    try:
        with (
            replaced(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            for case in site.cases:
                record = _record(case, data, hashes, budget, masks)
                make_room(path, sink.tell() + record.nbytes, budget)
                writer.write_batch(record)
    except OSError as error:
        raise cache_error(error, path) from error


def _record(
    case: CaseFile, data: DataSettings, hashes: dict[Path, str], budget: Budget, masks: bool
) -> pa.RecordBatch:
    """Return the record batch of one case."""
    facts: dict[str, Any] = {"name": case.name}
    try:
        slices = prepare(case, data, budget, masks=masks)
        arrays = [np.ascontiguousarray(getattr(slices, name)) for name in ARRAYS]
        content = content_of([case.image], hashes)
        facts["alias"] = digest(json.dumps([case.site, case.name, content]).encode(), 5)
        facts["spacing"] = slices.spacing
        facts["kind"] = slices.kind
        facts["content"] = slices.content
        facts["shapes"] = [array.shape for array in arrays]
        facts["types"] = [array.dtype.str for array in arrays]
    except FedsgcgError as error:
        if error.code == BEYOND:  # a matter of the request, not of the case
            raise
        facts["problem"] = asdict(error.problems[0]) | {"where": case.name}
        arrays = [np.zeros(0, np.uint8) for _ in ARRAYS]
    columns = [[json.dumps(facts)], *([array.tobytes()] for array in arrays)]
    types = [field.type for field in SCHEMA]
    return pa.record_batch(
        [pa.array(*pair) for pair in zip(columns, types, strict=True)], schema=SCHEMA
    )


def _open(path: Path) -> list[Row]:
    """Memory-map a cache file and return its rows without reading pixels."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [_row(reader.get_batch(number)) for number in range(reader.num_record_batches)]


def _row(batch: pa.RecordBatch) -> Row:
    """Return the facts of one record batch and, for a usable case, views of its arrays."""
    facts = json.loads(batch.column(0)[0].as_py())
    if "problem" in facts:
        return facts, None
    arrays = {}
    for number, name in enumerate(ARRAYS):
        flat = np.frombuffer(
            batch.column(number + 1)[0].as_buffer(), np.dtype(facts["types"][number])
        )
        arrays[name] = flat.reshape(facts["shapes"][number])
        # The mapping is read-only; writing to it would kill the process.
        arrays[name].flags.writeable = False
    spacing = tuple(facts["spacing"]) if facts["spacing"] else None
    return facts, Slices(**arrays, spacing=spacing, kind=facts["kind"], content=facts["content"])
