"""The installed software of a hospital, as it was when its staff approved it.

An app bundle runs on Python, Flower, torch and the installed program that starts it. Their code is
not in the bundle, so an approval also covers a lock of them (`Software`): the version of Python,
the SHA-256 of the installed program, of each `.pth` file and `sitecustomize` (which run when
Python starts), and for each distribution its version and the SHA-256 of its RECORD, the list of
its files with their hashes.

The lock reads no installed file but these, so it takes a fraction of a second. `changed_files`
compares every file with the RECORDs.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import platform
import site
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[2]
"""Folder of the packages: `site-packages/fedsgcg`, or the root of a checkout."""

PROGRAM_FOLDERS = ("clients", "common", "configs", "deploy", "fedsgcg", "server")
AT_START = ("sitecustomize.py", "usercustomize.py")
LOADABLE = (".py", ".pyc", ".pth", ".so")
BYTECODE = "__pycache__"
"""Never read by the site's processes (`deploy.isolated`), hence not part of the lock."""


@dataclass(frozen=True)
class Software:
    """What the processes of a site run besides the app bundle.

    Attributes:
        python: Implementation and version of Python.
        program: SHA-256 over the installed program.
        at_start: Name of a file that runs when Python starts -> SHA-256.
        distributions: Name -> version and SHA-256 of the RECORD, as one text.
    """

    python: str
    program: str
    at_start: Mapping[str, str] = field(default_factory=dict)
    distributions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def installed(cls, folders: Sequence[Path] | None = None, program: Path = PROGRAM) -> Software:
        """Read the lock of this machine.

        Args:
            folders: Folders of the distributions; default: those of this interpreter, whatever
                the environment variables add to its path.
            program: Folder of the installed program.
        """
        places = library_folders() if folders is None else folders
        return cls(
            python=f"{platform.python_implementation()} {platform.python_version()}",
            program=program_digest(program),
            at_start={
                path.name: _sha(path.read_bytes())
                for place in places
                for path in sorted(place.glob("*"))
                if path.is_file() and (path.suffix == ".pth" or path.name in AT_START)
            },
            distributions=_distributions(places),
        )

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Software:
        """Read what `as_tree` returned; raises KeyError, TypeError or ValueError otherwise."""
        return cls(
            python=str(tree["python"]),
            program=str(tree["program"]),
            at_start={str(name): str(text) for name, text in tree["at_start"].items()},
            distributions={str(name): str(text) for name, text in tree["distributions"].items()},
        )

    def as_tree(self) -> dict[str, Any]:
        """Return the lock for a JSON file."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """SHA-256 over the lock."""
        return _sha(json.dumps(self.as_tree(), sort_keys=True).encode())


def library_folders() -> list[Path]:
    """Return the folders of this interpreter's libraries; the user's own folder is not one."""
    return [Path(folder) for folder in site.getsitepackages() if Path(folder).is_dir()]


def software_changes(before: Software, now: Software) -> list[str]:
    """Describe each difference between two locks, one line each."""
    lines = []
    if before.python != now.python:
        lines.append(f"changed  Python  {before.python} -> {now.python}")
    if before.program != now.program:
        lines.append(f"changed  fedsgcg's code  {before.program[:12]} -> {now.program[:12]}")
    lines += _changes(before.at_start, now.at_start, "file that runs when Python starts: ")
    lines += _changes(before.distributions, now.distributions, "")
    return lines


def program_digest(program: Path = PROGRAM) -> str:
    """Return the SHA-256 over every file of the installed program that can be loaded."""
    found = {}
    for folder in PROGRAM_FOLDERS if (program / "pyproject.toml").is_file() else (".",):
        for path in sorted((program / folder).rglob("*")):
            if path.suffix in (*LOADABLE, ".yaml") and path.parent.name != BYTECODE:
                found[path.relative_to(program).as_posix()] = _sha(path.read_bytes())
    return _sha(json.dumps(found, sort_keys=True).encode())


def changed_files(folders: Sequence[Path] | None = None) -> Iterator[str]:
    """Yield installed files that differ from their RECORD, are missing, or are in no RECORD.

    Only files that Python can load are compared. A file in no RECORD is reported where its folder
    belongs to a distribution: an extension module there would be loaded instead of the source of
    the same name.
    """
    for place in library_folders() if folders is None else folders:
        known: set[Path] = set()
        for distribution in distributions(path=[str(place)]):
            for path, recorded in _record(distribution):
                if not _loadable(path):
                    continue
                known.add(path)
                mode, _, value = recorded.partition("=")
                if not recorded:
                    continue
                name = f"{path} ({distribution.name})"
                if not path.is_file():
                    yield f"missing: {name}"
                elif _record_hash(path, mode) != value:
                    yield f"changed: {name}"
        for folder in sorted({path.parent for path in known}):
            for path in sorted(folder.glob("*")) if folder.is_relative_to(place) else ():
                if _loadable(path) and path.is_file() and path.resolve() not in known:
                    yield f"in no distribution: {path}"


def _record(distribution: Distribution) -> Iterator[tuple[Path, str]]:
    """Yield the path and the hash (`sha256=…`, or "") of every file of a RECORD.

    `Distribution.files` leaves out missing files since Python 3.12.
    """
    for name, recorded, *_ in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        yield Path(str(distribution.locate_file(name))).resolve(), recorded


def _distributions(places: Sequence[Path]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for distribution in distributions(path=[str(place) for place in places]):
        name = str(distribution.name or "?").lower().replace("_", "-")
        found.setdefault(name, []).append(f"{distribution.version} {_record_digest(distribution)}")
    return {name: ", ".join(sorted(texts)) for name, texts in sorted(found.items())}


def _record_digest(distribution: Distribution) -> str:
    """Return the SHA-256 of a RECORD, or of the metadata where a packager leaves it out."""
    for name in ("RECORD", "METADATA", "PKG-INFO"):
        if text := distribution.read_text(name):
            return _sha(text.encode())
    return "unrecorded"


def _changes(before: Mapping[str, str], now: Mapping[str, str], label: str) -> list[str]:
    lines = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old is None and new is not None:
            lines.append(f"new      {label}{name}  {_short(new)}")
        elif new is None and old is not None:
            lines.append(f"removed  {label}{name}  {_short(old)}")
        elif old is not None and new is not None and old != new:
            lines.append(f"changed  {label}{name}  {_short(old)} -> {_short(new)}")
    return lines


def _short(text: str) -> str:
    """Shorten the hashes of `1.2 <sha256>`; a changed RECORD of one version must show."""
    return " ".join(part[:12] if len(part) >= 64 else part for part in text.split(" "))


def _loadable(path: Path) -> bool:
    loadable = path.suffix in LOADABLE or ".so." in path.name
    return loadable and BYTECODE not in path.parts


def _record_hash(path: Path, mode: str) -> str:
    digest = hashlib.new(mode, path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
