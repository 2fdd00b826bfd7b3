"""Approval of code at this hospital: the hashes of the app bundles that its staff approved.

The hash of a bundle (Flower's FAB, a zip file) covers its code: all files except documentation and
packaging (`READABLE`), and the name of the client app that Flower loads. The resident
(`deploy.site.resident`) checks a bundle before unpacking or importing it. For sites that run
Flower's own processes, the app also checks the folder it runs from (`check_approved`).

Flower 1.41's signed bundles (`--trusted-entities`) are not used. A SuperNode accepts only
signatures that its SuperLink fetched from Flower's hub together with the bundle
(`fab.verifications`), so a bundle submitted by `flwr run` from a coordinator's machine cannot be
verified. Also, a signature shows who wrote the code, not what has changed.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import shutil
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import fail

FOLDERS = ("clients", "common", "configs", "server")
CODE = (".py", ".yaml")
FEDSGCG = "fedsgcg/__init__.py"
NOT_BUNDLED = ("clients/predict/", "server/report/")
"""Folders that no app runs, so that a new style of the report needs no new approval."""

READABLE = ("README.md", "LICENSE", "pyproject.toml")
CLIENT_APP = "fedsgcg.clients.app:app"
MOST_BYTES = 50 * 2**20
"""Maximum unpacked size of a bundle; Flower refuses more than 10 MiB packed."""

MOST_FILES = 5000
LONGEST_NAME = 200
"""Bytes of a file's or folder's name in a bundle; file systems allow 255, `.partial` included."""

LONGEST_PATH = 1000
"""Bytes of a path in a bundle; Linux allows 4,096 with the folders above it."""

MOST_REFUSED = 5
"""Number of refused bundles kept for comparison."""


@dataclass(frozen=True)
class Bundle:
    """The code of one app bundle.

    Attributes:
        code: Path inside the bundle -> content.
        client_app: What Flower loads, as `module:attribute`.
    """

    code: Mapping[str, bytes]
    client_app: str = CLIENT_APP

    @property
    def digest(self) -> str:
        """SHA-256 over all paths, contents and the name of the client app."""
        files = {name: hashlib.sha256(content).hexdigest() for name, content in self.code.items()}
        return hashlib.sha256(
            json.dumps([self.client_app, files], sort_keys=True).encode()
        ).hexdigest()


def read_bundle(content: bytes) -> Bundle:
    """Read a Flower app bundle without unpacking or running it.

    Raises:
        FedsgcgError: POL-705 when the content is not a bundle, is too large, or has a path that
            leaves its folder.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes unpacked")
            if len(entries) > MOST_FILES:
                raise ValueError(f"more than {MOST_FILES} files")
            for entry in entries:
                _check_entry(entry)
            files = {entry.filename: archive.read(entry) for entry in entries}
        project = tomllib.loads(files["pyproject.toml"].decode())
        components = project["tool"]["flwr"]["app"]["components"]
        code = {
            name: text
            for name, text in files.items()
            if name not in READABLE and not name.startswith(".info/")
        }
        return Bundle(code, str(components["clientapp"]))
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, OSError),
        *(ValueError, KeyError, TypeError, AttributeError),
        *(NotImplementedError, RuntimeError),  # an encrypted file, deep nesting
    ) as error:
        raise fail(
            "POL-705", found=f"an unreadable bundle: {error}", expected="a Flower app bundle"
        ) from error


def code_of_folder(folder: Path) -> dict[str, bytes]:
    """Return the files of an app bundle made from this folder: path in the bundle -> content."""
    paths = sorted(
        path for name in FOLDERS for path in (folder / name).rglob("*") if path.suffix in CODE
    )
    files = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    # An install has the packages inside of fedsgcg, a checkout and a bundle next to it.
    inside = (folder / FEDSGCG).is_file()
    files[FEDSGCG] = folder / FEDSGCG if inside else folder / Path(FEDSGCG).name
    return {
        name: path.read_bytes() for name, path in files.items() if not name.startswith(NOT_BUNDLED)
    }


def is_bundled(import_path: str) -> bool:
    """Whether `package.module:Class` names code of the app bundle, which was approved with it."""
    package, _, rest = import_path.partition(":")[0].partition(".")
    return package == "fedsgcg" and rest.partition(".")[0] in FOLDERS


def bundle_of_folder(folder: Path) -> Bundle:
    """Return the code of an installed app, as the bundle of this folder would contain it."""
    return Bundle(code_of_folder(folder))


def unpack(bundle: Bundle, folder: Path) -> Path:
    """Write a bundle's code atomically into a subfolder named after its digest; return it.

    An existing subfolder is compared byte by byte, and replaced if it differs.
    """
    place = folder / bundle.digest
    if place.is_dir():
        if read_unpacked(place).code == bundle.code:
            return place
        shutil.rmtree(place)
    partial = folder / f"{bundle.digest}.{os.getpid()}.partial"
    for name, content in bundle.code.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / f"{bundle.digest}.app").write_text(bundle.client_app, encoding="utf-8")
    try:
        partial.rename(place)
    except OSError:
        if not place.is_dir():  # another process may have written the same content first
            raise
    return place


def approvals(path: Path) -> list[dict[str, Any]]:
    """Return the entries of the approvals file, oldest first; empty if there is no file.

    Raises:
        FedsgcgError: POL-705 when the file cannot be read; nothing is approved then.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["approved"]
        return [entry for entry in entries if isinstance(entry["digest"], str)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        action = "repair or remove the file, then approve again"
        raise fail(
            "POL-705",
            where=str(path),
            found=f"{error}",
            expected="a readable approvals file",
            action=action,
        ) from error


def is_approved(bundle: Bundle, path: Path) -> bool:
    """Return whether the site has approved exactly this code."""
    return any(entry["digest"] == bundle.digest for entry in approvals(path))


def require_approved(bundle: Bundle, path: Path) -> None:
    """Refuse code that the site has not approved.

    Raises:
        FedsgcgError: POL-705.
    """
    if not is_approved(bundle, path):
        raise fail(
            "POL-705",
            where=str(path),
            found=f"code {bundle.digest[:16]}",
            expected="code that this site has approved",
            action="fedsgcg-site approve KIT shows what changed since the last approval and asks",
        )


def approve(bundle: Bundle, path: Path, by: str) -> None:
    """Add an approval and keep the code, so that a later bundle can be compared with it."""
    entry = {
        "digest": bundle.digest,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": by,
    }
    known = [old for old in approvals(path) if old["digest"] != bundle.digest]
    path.parent.mkdir(parents=True, exist_ok=True)
    unpack(bundle, bundle_store(path))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"approved": [*known, entry]}, indent=1), encoding="utf-8")
    partial.chmod(0o600)
    partial.replace(path)


def bundle_store(path: Path) -> Path:
    """Return the folder with the code of approved and refused bundles, one subfolder per digest."""
    return path.parent / "bundles"


def last_approved(path: Path) -> Bundle | None:
    """Return the code that was approved last, or None."""
    known = approvals(path)
    folder = bundle_store(path) / known[-1]["digest"] if known else None
    return read_unpacked(folder) if folder is not None and folder.is_dir() else None


def read_unpacked(folder: Path) -> Bundle:
    """Return what `unpack` wrote into a folder."""
    app = folder.with_name(folder.name + ".app")
    client_app = app.read_text(encoding="utf-8") if app.is_file() else CLIENT_APP
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    ]
    return Bundle(
        {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}, client_app
    )


def refused_bundles(path: Path) -> list[Path]:
    """Return the folders of kept code that was not approved, newest first."""
    known = {entry["digest"] for entry in approvals(path)}
    folders = [
        folder
        for folder in bundle_store(path).glob("*")
        if folder.is_dir() and len(folder.name) == 64
    ]
    return sorted(
        (f for f in folders if f.name not in known), key=lambda f: f.stat().st_mtime, reverse=True
    )


def remove_old_refused(path: Path) -> None:
    """Keep only the newest refused bundles, so that many submissions cannot fill the disk."""
    for folder in refused_bundles(path)[MOST_REFUSED:]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(folder.name + ".app").unlink(missing_ok=True)


def difference(old: Bundle | None, new: Bundle) -> Iterator[tuple[str, str]]:
    """Yield (summary line, unified diff) for every file in which two bundles differ."""
    before: Mapping[str, bytes] = old.code if old else {}
    for name in sorted({*before, *new.code}):
        first, second = before.get(name), new.code.get(name)
        if first == second:
            continue
        lines = list(
            difflib.unified_diff(
                _lines(first), _lines(second), f"approved/{name}", f"bundle/{name}"
            )
        )
        added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
        removed = sum(line.startswith("-") and not line.startswith("---") for line in lines)
        yield f"{_status(first, second):8} {name}  (+{added} -{removed} lines)", "".join(lines)


def _status(old: bytes | None, new: bytes | None) -> str:
    if old is None:
        return "new"
    return "removed" if new is None else "changed"


def check_approved(policy: SiteFile) -> None:
    """Refuse to run from a folder whose code this site has not approved (POL-705)."""
    require_approved(_running(), Path(policy.approved))


@cache
def _running() -> Bundle:
    """Return the code this process runs from; cached, because loaded code does not change."""
    return bundle_of_folder(Path(__file__).resolve().parents[2])


def _lines(content: bytes | None) -> Sequence[str]:
    return [] if content is None else content.decode(errors="replace").splitlines(keepends=True)


def _check_entry(entry: zipfile.ZipInfo) -> None:
    """Raise ValueError for a file that cannot be unpacked within the limits."""
    name = entry.filename
    if _leaves_folder(name):
        raise ValueError(f"a path that leaves the bundle's folder: {name[:LONGEST_NAME]!r}")
    longest = max(len(os.fsencode(part)) for part in name.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(name)) > LONGEST_PATH:
        raise ValueError(f"a name of {longest} bytes: {name[:40]!r}...")
    # Python bounds what it inflates, but expands a block of the other methods at once.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression method {entry.compress_type} of {name!r}")


def _leaves_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
