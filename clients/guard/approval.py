"""Which code may run at this hospital: the hash of every app bundle that its people have approved.

A bundle (Flower's FAB, a zip file) is judged by its code: all files but the readable ones, and the name of the client
app that Flower loads. The resident (`deploy.site.resident`) judges a bundle before anything of it is unpacked or
imported; the app judges the folder it runs from once more (`check_approved`), for sites that run Flower's own
processes.

Flower 1.41's signed bundles (`--trusted-entities`) do not fit: a SuperNode accepts only signatures that its SuperLink
fetched from Flower's hub together with the bundle (`fab.verifications`), so that a bundle submitted by `flwr run` from
a coordinator's own machine can never be verified; and a signature says who wrote the code, not what has changed.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from clients.guard.site_file import SiteFile
from common.errors import fail

FOLDERS = ("clients", "common", "configs", "server")
CODE = (".py", ".yaml")
NOT_BUNDLED = ("clients/predict/", "server/report/")
"""Folders that no app runs. A change of the report's style must not need a new approval by every hospital."""

READABLE = ("README.md", "LICENSE", "pyproject.toml")
CLIENT_APP = "clients.app:app"
MOST_BYTES = 50 * 2**20
"""Unpacked size that a bundle may have; Flower refuses more than 10 MiB packed."""

MOST_REFUSED = 5
"""Refused bundles that are kept for comparison."""


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
        """SHA-256 over every path and content and the name of the client app."""
        files = {name: hashlib.sha256(content).hexdigest() for name, content in self.code.items()}
        return hashlib.sha256(
            json.dumps([self.client_app, files], sort_keys=True).encode()
        ).hexdigest()


def read_bundle(content: bytes) -> Bundle:
    """Read a Flower app bundle without writing or running anything of it.

    Raises:
        FedsgcgError: POL-705 when it is no bundle, too large, or holds a path that leads out of its folder.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes unpacked")
            if wrong := next(
                (entry.filename for entry in entries if _leads_out(entry.filename)), ""
            ):
                raise ValueError(f"a path that leads out: {wrong!r}")
            files = {entry.filename: archive.read(entry) for entry in entries}
        components = tomllib.loads(files["pyproject.toml"].decode())["tool"]["flwr"]["app"][
            "components"
        ]
        code = {
            name: text
            for name, text in files.items()
            if name not in READABLE and not name.startswith(".info/")
        }
        return Bundle(code, str(components["clientapp"]))
    except (
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        TypeError,
        OSError,
        NotImplementedError,
    ) as error:
        raise fail(
            "POL-705", found=f"no bundle that can be read: {error}", expected="a Flower app bundle"
        ) from error


def code_of_folder(folder: Path) -> dict[str, bytes]:
    """Return the files that an app bundle made of this folder holds: path inside the bundle -> content."""
    paths = sorted(
        path for name in FOLDERS for path in (folder / name).rglob("*") if path.suffix in CODE
    )
    files = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return {
        name: path.read_bytes() for name, path in files.items() if not name.startswith(NOT_BUNDLED)
    }


def bundle_of_folder(folder: Path) -> Bundle:
    """Return the code of an installed app: what the bundle of this folder would hold."""
    return Bundle(code_of_folder(folder))


def unpack(bundle: Bundle, folder: Path) -> Path:
    """Write the code of a bundle below a folder, under its digest, and return that place; whole or not at all.

    What lies there already is compared byte by byte, and replaced when it is not the code of the bundle.
    """
    place = folder / bundle.digest
    if place.is_dir():
        if code_below(place).code == bundle.code:
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
        if not place.is_dir():  # another process may have been faster with the same content
            raise
    return place


def approvals(path: Path) -> list[dict[str, Any]]:
    """Return the entries of the approvals file, oldest first; none when there is no file.

    Raises:
        FedsgcgError: POL-705 when the file cannot be read: then nothing is approved.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["approved"]
        return [entry for entry in entries if isinstance(entry["digest"], str)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        action = "mend or remove the file, then approve again"
        raise fail(
            "POL-705",
            where=str(path),
            found=f"{error}",
            expected="the approvals file",
            action=action,
        ) from error


def is_approved(bundle: Bundle, path: Path) -> bool:
    """Whether the site has approved exactly this code."""
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
    """Add an approval, and keep the code beside the file so that the next difference can be shown."""
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
    """Folder in which the code of approved and of refused bundles is kept, one folder a digest."""
    return path.parent / "bundles"


def last_approved(path: Path) -> Bundle | None:
    """Return the code of the newest approval, or None."""
    known = approvals(path)
    folder = bundle_store(path) / known[-1]["digest"] if known else None
    return code_below(folder) if folder is not None and folder.is_dir() else None


def code_below(folder: Path) -> Bundle:
    """Return what `unpack` wrote into a folder."""
    said = folder.with_name(folder.name + ".app")
    client_app = said.read_text(encoding="utf-8") if said.is_file() else CLIENT_APP
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    ]
    return Bundle(
        {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}, client_app
    )


def refused(path: Path) -> list[Path]:
    """Return the folders of kept code that is not approved, newest first."""
    known = {entry["digest"] for entry in approvals(path)}
    folders = [
        folder
        for folder in bundle_store(path).glob("*")
        if folder.is_dir() and len(folder.name) == 64
    ]
    return sorted(
        (f for f in folders if f.name not in known), key=lambda f: f.stat().st_mtime, reverse=True
    )


def forget_old(path: Path) -> None:
    """Keep only the newest refused bundles, so that whoever submits many cannot fill the disk."""
    for folder in refused(path)[MOST_REFUSED:]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(folder.name + ".app").unlink(missing_ok=True)


def difference(old: Bundle | None, new: Bundle) -> Iterator[tuple[str, str]]:
    """Yield (one line that names a changed file, unified diff) for what a bundle changes against another."""
    before: Mapping[str, bytes] = old.code if old else {}
    for name in sorted({*before, *new.code}):
        first, second = before.get(name), new.code.get(name)
        if first == second:
            continue
        word = "new" if first is None else "removed" if second is None else "changed"
        lines = list(
            difflib.unified_diff(
                _lines(first), _lines(second), f"approved/{name}", f"bundle/{name}"
            )
        )
        more = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
        less = sum(line.startswith("-") and not line.startswith("---") for line in lines)
        yield f"{word:8} {name}  (+{more} -{less} lines)", "".join(lines)


def check_approved(policy: SiteFile) -> None:
    """Refuse to work from a folder whose code this site has not approved (POL-705)."""
    require_approved(_running(), Path(policy.approved))


@cache
def _running() -> Bundle:
    """The code this process runs from; a process's code does not change under it."""
    return bundle_of_folder(Path(__file__).resolve().parents[2])


def _lines(content: bytes | None) -> Sequence[str]:
    return [] if content is None else content.decode(errors="replace").splitlines(keepends=True)


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
