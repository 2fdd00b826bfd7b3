"""What was predicted, so that an interrupted run can be resumed: `predictions.jsonl`.

Before an image is predicted a line says `started`, after its results are complete a line says
`done` with the SHA-256 of each result. A result counts as done only if the image and its mask, the
model, the options and every result are unchanged: a file that exists may be half of one, or of
another model. A line that was cut off by the interruption is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedsgcg.clients.predict.files import Job, write_error
from fedsgcg.common.errors import fail
from fedsgcg.common.files.seals import digest_of
from fedsgcg.common.images.parts import files_of

RECORD: Final = "predictions.jsonl"
"""File in the output folder."""


@dataclass(frozen=True)
class Done:
    """The results of one image.

    Attributes:
        files: Path relative to the output folder -> SHA-256.
        scores: Rows of the table of scores.
        trained_on: Hospital at which the model was trained on this image, "" for a new one.
    """

    files: Mapping[str, str]
    scores: Sequence[Mapping[str, Any]] = ()
    trained_on: str = ""


@dataclass
class Record:
    """The lines of `predictions.jsonl` in one folder.

    Attributes:
        folder: The output folder.
        request: Digest of the model and of the options that affect results.
    """

    folder: Path
    request: str
    _last: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, model: Mapping[str, Any], options: Mapping[str, Any]) -> Record:
        """Read the record of a folder, if there is one.

        Args:
            folder: The output folder.
            model: Content of `model.json`.
            options: What else decides the content of the results.

        Raises:
            FedsgcgError: MOD-813 for a record that is not readable.
        """
        text = json.dumps([model, options], sort_keys=True, default=str)
        record = cls(folder, hashlib.sha256(text.encode()).hexdigest())
        path = folder / RECORD
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return record
        except OSError as error:
            raise fail(
                "MOD-813",
                where=str(path),
                found=f"{type(error).__name__}: {error.strerror or error}",
                expected="the record of this folder",
                action="Give this user permission to read it, or choose another DIR.",
            ) from error
        for line in lines:
            try:
                entry = json.loads(line)
                record._last[str(entry["name"])] = entry
            except (ValueError, KeyError, TypeError):
                continue  # cut off
        return record

    def is_own(self, job: Job) -> bool:
        """Whether results of this image are of this model and these options, maybe incomplete."""
        return self._last.get(job.name, {}).get("request") == self.request

    def finished(self, job: Job) -> Done | None:
        """Return the complete and unchanged results of an image, None if it must be predicted."""
        entry = self._last.get(job.name, {})
        if not self.is_own(job) or not entry.get("files") or entry.get("input") != contents(job):
            return None
        for name, sha256 in entry["files"].items():
            path = self.folder / name
            if not path.is_file() or digest_of(path) != sha256:
                return None
        return Done(entry["files"], entry.get("scores", ()), entry.get("trained_on", ""))

    def start(self, job: Job) -> None:
        """Record that an image's results are about to be written."""
        self._append({"name": job.name, "request": self.request})

    def finish(self, job: Job, results: Sequence[Path], done: Done) -> None:
        """Record that an image's results are complete; `done.files` is computed from `results`."""
        files = {
            str(file.relative_to(self.folder)): digest_of(file)
            for path in results
            for file in files_of(path)
        }
        entry = {
            "name": job.name,
            "request": self.request,
            "input": contents(job),
            "files": files,
            "scores": list(done.scores),
            "trained_on": done.trained_on,
        }
        self._append(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        path = self.folder / RECORD
        try:
            with path.open("ab+") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 1))
                # A line that was cut off must not swallow this one.
                start = b"" if size == 0 or file.read(1) == b"\n" else b"\n"
                file.write(start + json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise write_error(path, error) from error


def contents(job: Job, *, masks: bool = True) -> str:
    """Return a digest of the image's files and of its mask's, "" if one cannot be read."""
    found = hashlib.sha256()
    try:
        for number, path in enumerate((job.image, *(job.masks if masks else ()))):
            for file in files_of(path):
                name = os.fsencode(file.name)
                found.update(b"%d %s %s\n" % (number, name, digest_of(file).encode()))
    except OSError:
        return ""
    return found.hexdigest()
