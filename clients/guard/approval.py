"""Approval of code at this hospital: the hashes of the app bundles that its staff approved.

The hash of a bundle (Flower's FAB, a zip file) covers its code: all files except documentation and
packaging (`READABLE`), and the name of the client app that Flower loads. A bundle contains source
code only: a file of another kind (bytecode, a library) is refused. The resident
(`deploy.site.resident`) checks a bundle before anything of it is unpacked or imported; a refused
bundle is kept as one file. For sites that run Flower's own processes, the app also checks the
folder it runs from (`check_approved`).

An approval also covers the software that runs the bundle (`clients.guard.software`).

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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.clients.guard.software import BYTECODE, Software, software_changes
from fedsgcg.common.errors import fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.settings.choices import is_import_path

FOLDERS = ("clients", "common", "configs", "server")
CODE = (".py", ".yaml")
FEDSGCG = "fedsgcg/__init__.py"
NOT_BUNDLED = ("clients/predict/", "server/report/", "server/telemetry/")
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

MOST_CHANGES = 8
"""Number of changes of the installed software that an error lists."""


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
                if not _is_source(entry.filename):
                    raise ValueError(f"a file that is not source code: {entry.filename!r}")
            if len({entry.filename for entry in entries}) < len(entries):
                raise ValueError("two files of one name")
            files = {entry.filename: archive.read(entry) for entry in entries}
        project = tomllib.loads(files["pyproject.toml"].decode())
        components = project["tool"]["flwr"]["app"]["components"]
        code = {
            name: text
            for name, text in files.items()
            if name not in READABLE and not name.startswith(".info/")
        }
        client_app = str(components["clientapp"])
        if not is_import_path(client_app):
            raise ValueError(f"a client app {client_app!r} that is not package.module:attribute")
        return Bundle(code, client_app)
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


def pack(bundle: Bundle) -> bytes:
    """Return a bundle as a file that `read_bundle` reads; it is kept for comparison."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(bundle.code.items()):
            archive.writestr(name, text)
        archive.writestr(
            "pyproject.toml",
            f"[tool.flwr.app.components]\nclientapp = {json.dumps(bundle.client_app)}\n",
        )
    return content.getvalue()


def keep(bundle: Bundle, path: Path) -> Path:
    """Keep a bundle, packed, in the store of an approvals file, and return its file."""
    file = bundle_store(path) / f"{bundle.digest}.fab"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(file, pack(bundle))
    return file


def unpack(bundle: Bundle, folder: Path) -> Path:
    """Write an approved bundle's code into a subfolder named after its digest; return it.

    The subfolder is written atomically. An existing one is compared byte by byte, and replaced if
    any file differs, is missing or was added, also in a `__pycache__`.
    """
    place = folder / bundle.digest
    if place.is_dir():
        if read_unpacked(place) == bundle.code:
            return place
        shutil.rmtree(place)
    partial = folder / f"{bundle.digest}.{os.getpid()}.partial"
    for name, content in bundle.code.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
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
    with _readable(path):
        return [entry for entry in _tree(path)["approved"] if isinstance(entry["digest"], str)]


def approved_software(path: Path) -> Software | None:
    """Return the lock of the software that was approved last; None if there is none.

    Raises:
        FedsgcgError: POL-705 when the file cannot be read.
    """
    with _readable(path):
        tree = _tree(path).get("software")
        return None if tree is None else Software.from_tree(tree)


def require_software(path: Path, now: Software) -> None:
    """Refuse to run with installed software that differs from the approved one.

    Raises:
        FedsgcgError: POL-708 with each difference.
    """
    before = approved_software(path)
    if before == now:
        return
    changes = software_changes(before, now) if before else ["no approved list of this software"]
    more = f"; and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
    raise fail(
        "POL-708",
        where=str(path),
        found="; ".join(changes[:MOST_CHANGES]) + more,
        expected="the software that was installed at the last approval",
        action="fedsgcg-site approve KIT shows the changes and asks",
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(
            "POL-705",
            where=str(path),
            found=f"{error}",
            expected="a readable approvals file",
            action="repair or remove the file, then approve again",
        ) from error


def _tree(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"approved": []}


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


def approve(bundle: Bundle, path: Path, by: str, software: Software | None = None) -> None:
    """Add an approval and keep the code, so that a later bundle can be compared with it.

    Args:
        bundle: The approved code.
        path: The approvals file.
        by: Who approves.
        software: The approved installed software; default: what is installed now.
    """
    lock = software or Software.installed()
    entry = {
        "digest": bundle.digest,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": by,
        "software": lock.digest,
    }
    known = [old for old in approvals(path) if old["digest"] != bundle.digest]
    path.parent.mkdir(parents=True, exist_ok=True)
    keep(bundle, path)
    tree = {"approved": [*known, entry], "software": lock.as_tree()}
    write_file(path, json.dumps(tree, indent=1).encode(), mode=0o600)


def bundle_store(path: Path) -> Path:
    """Return the folder of approved and refused bundles: a file and, once run, a folder each."""
    return path.parent / "bundles"


def last_approved(path: Path) -> Bundle | None:
    """Return the code that was approved last, or None."""
    known = approvals(path)
    file = bundle_store(path) / f"{known[-1]['digest']}.fab" if known else None
    return read_kept(file) if file is not None and file.is_file() else None


def read_kept(file: Path) -> Bundle:
    """Read a bundle that `keep` wrote; raises POL-705 when the file was changed since."""
    bundle = read_bundle(file.read_bytes())
    if bundle.digest != file.stem:
        found, action = f"code {bundle.digest}", "remove the file"
        raise fail("POL-705", where=str(file), found=found, expected=file.stem, action=action)
    return bundle


def read_unpacked(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder: path -> content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def refused_bundles(path: Path) -> list[Path]:
    """Return the files of kept bundles that were not approved, newest first."""
    known = {entry["digest"] for entry in approvals(path)}
    files = [file for file in bundle_store(path).glob("*.fab") if file.stem not in known]
    return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)


def remove_old_refused(path: Path) -> None:
    """Keep only the newest refused bundles, so that many submissions cannot fill the disk."""
    for file in refused_bundles(path)[MOST_REFUSED:]:
        file.unlink(missing_ok=True)


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


def _is_source(name: str) -> bool:
    path = PurePosixPath(name)
    if name in READABLE or name.startswith(".info/"):
        return True
    return path.suffix in CODE and BYTECODE not in path.parts


def _leaves_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
