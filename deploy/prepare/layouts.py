"""Layouts of other tools: folders of nnU-Net, of the Medical Segmentation Decathlon, and BIDS.

nnU-Net: `imagesTr/<case>_<channel>.*`, `labelsTr/<case>.*`, `dataset.json` with `labels` as name to
value, or to a list of values for a region. The decathlon: the same folders, files without a channel
and `labels` as value to name. Both are described in nnU-Net's "dataset_format" and in Antonelli et
al. 2022, https://doi.org/10.1038/s41467-022-30695-9.

BIDS: `sub-<id>[/ses-<id>]/anat`, labels below `derivatives`, the names of label values in
`*dseg.tsv`, and hospitals in a column of `participants.tsv`
(https://bids-specification.readthedocs.io, "Imaging derivatives").
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedsgcg.clients.data.manifest import COLUMNS
from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.images.folders import counted_names, without_suffix
from fedsgcg.common.names import number_of, printable

CHANNEL: Final = re.compile(r"(.+)_(\d{4})")
SUBJECT: Final = re.compile(r"(sub-[^_]+)(?:_(ses-[^_]+))?(?:_|$)")
LABEL_ENDS: Final = ("dseg", "seg", "mask")
"""Last part of the names of BIDS labels; `probseg` has probabilities and is not read."""


@dataclass(frozen=True)
class Line:
    """One case of a CSV file or a folder.

    Attributes:
        site: Name of the hospital, "" if neither the folders nor a table say it.
        image: Image file, or the folder with the files of a DICOM series.
        mask: Mask file; the first of `structures` if each has a file; None without a mask.
        patient: The patient's id, "" if each case is a patient.
        split: `train`, `validation`, `test` or "".
        name: Name of the case, "" for the image's.
        structures: (name, mask file) of each structure with a mask of its own.
        files: The files of a DICOM series.
        segmentations: Several DICOM segmentations that are the mask together.
        person: What the image's header says about the patient, to find the images of one person;
            it is neither written nor shown.
    """

    site: str
    image: Path
    mask: Path | None
    patient: str = ""
    split: str = ""
    name: str = ""
    structures: tuple[tuple[str, Path], ...] = ()
    files: tuple[Path, ...] = ()
    segmentations: tuple[Path, ...] = ()
    person: str = field(default="", repr=False)

    @property
    def masks(self) -> tuple[Path, ...]:
        """The mask files: none, one, or one for each structure or segmentation."""
        if self.structures:
            return tuple(path for _, path in self.structures)
        if self.segmentations:
            return self.segmentations
        return () if self.mask is None else (self.mask,)


@dataclass
class Layout:
    """Cases and names that a layout states.

    Attributes:
        title: Name of the layout, for people.
        lines: The cases.
        names: Label value -> name, empty if the folder does not say it.
        regions: Region -> its label values (nnU-Net), reported as one structure.
        problems: What contradicts, is missing or is left out.
        notes: Notes for the user.
    """

    title: str
    lines: list[Line] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def recognise(source: Path, files: Sequence[Path], channel: str = "") -> Layout | None:
    """Return the content of a folder of nnU-Net, of the decathlon or of BIDS; None for another one.

    Args:
        source: The folder. Several folders of nnU-Net in it are one hospital each.
        files: All image files in it, sorted.
        channel: Name or number of nnU-Net's channel that is used; "" = the first one.

    Raises:
        FedsgcgError: DAT-180 for BIDS without labels, DAT-181 for an unusable dataset.json, DAT-182
            for a name that a label table has twice.
    """
    roots = sorted({path.parent.parent for path in files if path.parent.name == "imagesTr"})
    labelled = any(path.parent.name == "labelsTr" for path in files)
    if not roots and (labelled or (source / "dataset.json").is_file()):
        found = f"{'labelsTr' if labelled else 'dataset.json'} and no image in imagesTr"
        raise _error("DAT-183", found, "imagesTr and labelsTr", "Unpack it again.", str(source))
    if roots:
        layout = Layout("nnU-Net or Medical Segmentation Decathlon")
        for root in roots:
            _decathlon(root, files, layout, channel)
        return layout
    if any(path.parent.name == "anat" and SUBJECT.match(path.name) for path in files):
        return _bids(source, files)
    return None


def _decathlon(root: Path, files: Sequence[Path], layout: Layout, channel: str) -> None:
    """Add the cases of one folder with `imagesTr`."""
    site = printable(root.resolve().name)
    declared = _dataset_json(root)
    _add_labels(declared.get("labels", {}), root / "dataset.json", layout)
    images: dict[str, dict[str, Path]] = defaultdict(dict)
    channels = bool(declared.get("channel_names")) or _has_channels(root, files)
    wanted = _channel_number(channel, declared, root)
    for path in files:
        if path.parent == root / "imagesTr":
            stem = without_suffix(path.name)
            match = CHANNEL.fullmatch(stem) if channels else None
            case, number = match.groups() if match else (stem, "0000")
            images[case][number] = path
    masks = {without_suffix(path.name): path for path in files if path.parent == root / "labelsTr"}
    for case, found in sorted(images.items()):
        if used := found.get(wanted or min(found)):
            layout.lines.append(Line(site, used, masks.get(case), patient=case))
    layout.notes += _left_out(root, site, files, declared, images, wanted)
    layout.problems += _incomplete(root, declared, images, masks, wanted)


def _channel_number(channel: str, declared: dict[str, Any], root: Path) -> str:
    """Return a channel as in file names, "" for the first one; raises DAT-183 for an unknown one.

    Channels are named in `channel_names`, in older folders and the decathlon in `modality`.
    """
    named = declared.get("channel_names") or declared.get("modality")
    names = {str(key): str(name) for key, name in named.items()} if isinstance(named, dict) else {}
    if not channel:
        return ""
    number = next((key for key, name in names.items() if name == channel), channel)
    if number.isdigit() and (number in names or not names):
        return f"{int(number):04d}"
    expected = " | ".join(f"{key} ({name})" for key, name in names.items()) or "a number"
    raise _error("DAT-183", f"--channel {channel}", expected, "Name one of them.", str(root))


def _left_out(
    root: Path,
    site: str,
    files: Sequence[Path],
    declared: dict[str, Any],
    images: dict[str, dict[str, Path]],
    wanted: str,
) -> list[str]:
    """Return notes on images that no case uses: further channels, and those of imagesTs."""
    notes = []
    numbers = sorted({number for found in images.values() for number in found})
    if len(numbers) > 1:
        used = wanted or numbers[0]
        named = declared.get("channel_names") or declared.get("modality")
        names = named if isinstance(named, dict) else {}
        texts = [f"{number} {names.get(str(int(number)), '')}".strip() for number in numbers]
        chosen = texts[numbers.index(used)] if used in numbers else used
        notes.append(
            f"{site}: images have the channels {', '.join(texts)}; only {chosen} is used: a "
            "network sees one image. --channel NAME uses another one"
        )
    if tests := [path for path in files if path.parent == root / "imagesTs"]:
        left_out = counted_names(tests, "image", "in imagesTs without a label, left out")
        notes.append(f"{site}: {left_out}; `fedsgcg-site predict` segments them")
    return notes


def _has_channels(root: Path, files: Sequence[Path]) -> bool:
    """Whether every image ends with a channel and a label exists without it."""
    names = [without_suffix(path.name) for path in files if path.parent == root / "imagesTr"]
    labels = {without_suffix(path.name) for path in files if path.parent == root / "labelsTr"}
    stems = [CHANNEL.fullmatch(name) for name in names]
    return all(stems) and any(stem is not None and stem[1] in labels for stem in stems)


def _dataset_json(root: Path) -> dict[str, Any]:
    """Return the content of `dataset.json`, {} if there is none."""
    path = root / "dataset.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_pairs)
    except (OSError, ValueError) as error:
        action = "Correct the file, or get the data again."
        raise _error("DAT-181", str(error), "JSON with labels", action, str(path)) from error
    if not isinstance(content, dict) or not isinstance(content.get("labels", {}), dict):
        action = 'Write "labels": {"background": 0, "prostate": 1}.'
        raise _error("DAT-181", "labels that are no object", "name: value", action, str(path))
    return content


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that occurs twice, of which JSON would silently keep the last."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} twice")
    return dict(pairs)


def _add_labels(labels: dict[str, Any], where: Path, layout: Layout) -> None:
    """Add the names of label values; both ways round are read."""
    names: list[tuple[int, str]] = []
    for key, value in labels.items():
        if key == "ignore":
            layout.notes.append("cases with the label `ignore` are left out: it is no class")
        elif isinstance(value, str) and key.isdigit():
            names.append((int(key), value))  # decathlon
        elif isinstance(value, int) and not isinstance(value, bool):
            names.append((value, key))
        elif isinstance(value, list) and all(type(item) is int for item in value):
            layout.regions[plain_name(key)] = tuple(value)
        else:
            action = "Write name: value, or value: name as in the decathlon."
            found = f"label {key!r}: {value!r}"
            raise _error("DAT-181", found, "a name and whole numbers", action, str(where))
    _add_names(names, where, layout)


def _add_names(names: Iterable[tuple[int, str]], where: Path, layout: Layout) -> None:
    """Add names of label values; raises DAT-182 for a contradiction."""
    pairs = [(value, plain_name(name)) for value, name in names]
    for what, keys in (
        ("value", [str(value) for value, _ in pairs]),
        ("name", [name for _, name in pairs]),
    ):
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            found = f"{what} {', '.join(twice)} twice"
            action = "Give every value one name of its own."
            raise _error("DAT-182", found, f"every {what} once", action, str(where))
    for value, name in pairs:
        known = layout.names.setdefault(value, name)
        other = next((v for v, n in layout.names.items() if n == name and v != value), value)
        if known != name or other != value:
            found = f"value {value} is {name}, elsewhere value {other} is {known}"
            action = "Use the same values for the same structures at all hospitals."
            raise _error("DAT-182", found, "one name for a value", action, str(where))


def plain_name(name: str) -> str:
    """Return a name for the settings: letters, digits and underscores."""
    return re.sub(r"\W+", "_", name.strip()).strip("_") or "class"


def _incomplete(
    root: Path,
    declared: dict[str, Any],
    images: dict[str, dict[str, Path]],
    masks: dict[str, Path],
    wanted: str,
) -> list[Problem]:
    """Return what `dataset.json` and the folders do not agree about."""
    action = "Unpack the archive again, or correct dataset.json if cases were removed on purpose."
    expected = "an image and a label for every case"
    found = []
    if alone := sorted(masks.keys() - images.keys()):
        paths = [masks[case] for case in alone]
        found.append(counted_names(paths, "label", "without an image"))
    if wanted and (short := sorted(case for case, one in images.items() if wanted not in one)):
        found.append(counted_names(map(Path, short), "case", f"without channel {wanted}"))
    if bare := sorted(images.keys() - masks.keys()):
        found.append(counted_names(map(Path, bare), "image", "without a label"))
    stated = declared.get("numTraining")
    if isinstance(stated, int) and stated != len(images):
        found.append(f"{number_of(len(images), 'case')}, dataset.json states {stated}")
    listed = declared.get("training")
    for item in listed if isinstance(listed, list) else []:
        entry = item if isinstance(item, dict) else {"image": item}
        texts = [entry[key] for key in ("image", "label") if isinstance(entry.get(key), str)]
        gone = [text for text in texts if not _has_file(root, text)]
        found += [f"dataset.json lists {printable(text)}, which is missing" for text in gone]
    return [Problem("DAT-183", text, expected, action, str(root)) for text in found]


def _has_file(root: Path, text: str) -> bool:
    """Whether a listed file exists, also with its channel, which nnU-Net's lists leave out."""
    path = root / text
    stem = without_suffix(path.name)
    return path.is_file() or path.with_name(path.name.replace(stem, f"{stem}_0000", 1)).is_file()


def _bids(source: Path, files: Sequence[Path]) -> Layout:
    """List a BIDS folder: one hospital, or those of `participants.tsv`."""
    layout = Layout("BIDS")
    images: dict[tuple[str, str], list[Path]] = defaultdict(list)
    labels: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in files:
        match = SUBJECT.match(path.name)
        if match is None or path.parent.name != "anat":
            continue
        last = without_suffix(path.name).rpartition("_")[2]
        key = (match[1], match[2] or "")
        derived = "derivatives" in path.relative_to(source).parts
        if derived and last in LABEL_ENDS:
            labels[key].append(path)
        elif not derived:
            images[key].append(path)
    if not labels:
        expected = "derivatives/<name>/sub-*/anat/*_dseg.nii.gz"
        action = "Export the labels as BIDS derivatives, or list the cases in manifest.csv."
        found = f"images of {number_of(len({key[0] for key in images}), 'subject')} and no label"
        raise _error("DAT-180", found, expected, action, str(source))
    sites = _participants(source)
    for key, masks in sorted(labels.items()):
        site = sites.get(key[0]) or printable(source.resolve().name)
        _add_subject(site, key[0], images.get(key, []), masks, layout)
    used = {line.image for line in layout.lines}
    if others := [path for key in labels for path in images.get(key, []) if path not in used]:
        what = "of subjects with labels, not used"
        layout.notes.append(counted_names(others, "further image", what))
    without = sorted(
        {f"{subject} {session}".strip() for subject, session in images.keys() - labels}
    )
    if without:
        what = "without a label, not used"
        layout.notes.append(counted_names(map(Path, without), "subject", what))
    for table in sorted(source.rglob("*dseg.tsv")):
        rows = _table(table)
        pairs = [(row.get("index", ""), row.get("name", "")) for row in rows]
        _add_names([(int(v), n) for v, n in pairs if v.isdigit() and n], table, layout)
    return layout


def _add_subject(
    site: str, subject: str, images: Sequence[Path], masks: Sequence[Path], layout: Layout
) -> None:
    """Pair the labels of a subject and session with its images."""
    pairs: dict[Path, list[Path]] = defaultdict(list)
    for mask in masks:
        stem = without_suffix(mask.name)
        fitting = [one for one in images if stem.startswith(f"{without_suffix(one.name)}_")]
        fitting = fitting or list(images)
        if len(fitting) == 1:
            pairs[fitting[0]].append(mask)
            continue
        found = counted_names(images, "image") if images else "no image"
        action = "Name the label after its image, e.g. sub-1_T2w_dseg for sub-1_T2w."
        layout.problems.append(
            Problem("DAT-183", found, "one image for a label", action, str(mask))
        )
    for image, found_masks in pairs.items():
        if len(found_masks) > 1:
            names = counted_names(found_masks, "label", "of one image")
            action = "Keep one label map; several cannot be merged without knowing which is right."
            layout.problems.append(Problem("DAT-167", names, "one label map", action, str(image)))
        else:
            layout.lines.append(Line(site, image, found_masks[0], patient=subject))


def _participants(source: Path) -> dict[str, str]:
    """Return subject -> hospital, if `participants.tsv` has a column for it."""
    path = source / "participants.tsv"
    if not path.is_file():
        return {}
    found = {}
    for row in _table(path):
        name = next((row[title] for title in COLUMNS["site"] if row.get(title)), "")
        if name and name != "n/a":
            found[row.get("participant_id", "")] = printable(name)
    return found


def _table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table with tabs, titles in lower case."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            return [
                {
                    str(key).lower(): (value or "").strip()
                    for key, value in row.items()
                    if isinstance(value, str | None)
                }
                for row in reader
            ]
    except (OSError, ValueError, csv.Error) as error:
        action = "Save it as text in UTF-8 with tabs between the columns."
        raise _error("DAT-182", str(error), "a table with tabs", action, str(path)) from error


def _error(code: str, found: str, expected: str, action: str, where: str) -> FedsgcgError:
    return FedsgcgError(Problem(code, found, expected, action, where))
