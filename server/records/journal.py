"""The journal: a durable record of the completed rounds, from which a run resumes.

A round is complete when its checkpoint exists. The rows of the round are written first, then the
checkpoint, which contains the hash of every rows file so far. After an interruption between the
two, the rows without a checkpoint are deleted on resume. The last two checkpoints are kept, so that
a damaged newest one costs one round and not the run.

    journal/plan.json                       decisive settings and their digest
    journal/lock                            process that is using the folder
    journal/rounds/00001.arrow              rows of round 1
    journal/checkpoint-00001.safetensors    weights, prototypes and best model after round 1
    journal/checkpoint-00001.seal.json      its hash, signed by the coordinator's server

A checkpoint contains its own hash, which whoever edits it can compute anew. A coordinator's server
therefore signs it, and a run that has signed checkpoints resumes only from those.

Uses only PyArrow, safetensors and the standard library. Legend: P floating-point weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.disk import Disk, refusals
from fedsgcg.common.files.seals import broken_seal, encode_seal
from fedsgcg.common.files.signing import Signer
from fedsgcg.common.files.system import lock
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.plan import NOT_DECISIVE, Plan
from fedsgcg.server.records.checkpoint import (
    RoundRecord,
    damage,
    decode_checkpoint,
    decode_rows,
    encode_checkpoint,
    encode_rows,
)

CHECKPOINTS_KEPT: Final = 2


class Journal:
    """The journal of one run folder, locked for this process until `close`.

    Args:
        folder: Run folder of the cell.
        plan_digest: Digest of the plan; a folder that belongs to another plan is refused.
        settings_tree: The decisive settings (`decisive_settings`), stored so that an error can list
            the differences.
        disk: Disk access; tests pass one that fails.
        signer: Signs the checkpoints; None in a simulation.

    Raises:
        FedsgcgError: CFG-006 when another process uses the folder, CFG-005 for another plan,
            SRV-401 when a file cannot be written, SRV-402 when one is damaged.
    """

    def __init__(
        self,
        folder: Path,
        plan_digest: str,
        settings_tree: Mapping[str, Any],
        disk: Disk | None = None,
        signer: Signer | None = None,
    ) -> None:
        self.folder = Path(folder) / paths.JOURNAL
        self.damaged: tuple[Problem, ...] = ()
        self._digest = plan_digest
        self._disk = disk or Disk()
        self._signer = signer
        self._sealed = False
        self._hashes: list[str] = []
        with refusals(self.folder):
            self._disk.make_folder(self.folder / "rounds")
        self._lock = lock_file(self.folder / paths.LOCK)
        try:
            self._check_plan(settings_tree)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_plan(cls, plan: Plan, disk: Disk | None = None) -> Journal:
        """Open the journal in the plan's output folder."""
        signer = Signer.of_process()
        return cls(Path(plan.output), plan.digest(), decisive_settings(plan), disk, signer)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()

    def commit_round(self, record: RoundRecord) -> None:
        """Write a round durably: first its rows, then the checkpoint.

        After this call the round survives a power failure.

        Raises:
            FedsgcgError: SRV-401 when a file cannot be written; the last checkpoint is unchanged.
        """
        if record.round != len(self._hashes) + 1:
            raise ValueError(f"round {record.round} cannot follow round {len(self._hashes)}")
        rows = encode_rows(record.rows)
        hashes = [*self._hashes, _sha(rows)]
        self._disk.write(self._rows_path(record.round), rows)
        path, data = self._checkpoint_path(record.round), encode_checkpoint(record, hashes)
        if self._signer is not None:  # before the checkpoint: a checkpoint completes the round
            self._disk.write(_seal_path(path), encode_seal({path.name: _sha(data)}, self._signer))
        self._disk.write(path, data)
        self._hashes = hashes
        for path in self._checkpoints()[CHECKPOINTS_KEPT:]:
            self._disk.discard(path)
            self._disk.discard(_seal_path(path))

    def resume(self) -> RoundRecord | None:
        """Return the newest intact checkpoint, None if no round is complete.

        Newer damaged checkpoints are listed in `damaged`; rows without a checkpoint are deleted.

        Raises:
            FedsgcgError: SRV-402 when there are files but no intact checkpoint.
        """
        record: RoundRecord | None = None
        hashes: list[str] = []
        problems: list[Problem] = []
        for path in self._checkpoints():
            try:
                record, hashes = self._read_checkpoint(path)
                break
            except FedsgcgError as error:
                problems.extend(error.problems)
        later_rows = any(number > 1 for number in self._rows_present())
        if record is None and (problems or later_rows):
            raise FedsgcgError(
                *(problems or [damage(self.folder, "rows of rounds without any checkpoint")])
            )
        self.damaged = tuple(problems)
        self._hashes = hashes
        self._tidy(len(hashes))
        return record

    @property
    def done(self) -> int:
        """Number of completed rounds."""
        return len(self._hashes)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of all completed rounds in order; raises SRV-402 for a damaged file."""
        found: list[dict[str, Any]] = []
        for number, wanted in enumerate(self._hashes, start=1):
            found.extend(decode_rows(self._checked_rows(number, wanted)))
        return found

    def _check_plan(self, settings_tree: Mapping[str, Any]) -> None:
        path = self.folder / "plan.json"
        if not path.exists():
            self._sealed = self._signer is not None
            tree: dict[str, Any] = {"digest": self._digest, "settings": settings_tree}
            tree |= {"sealed": True} if self._sealed else {}
            self._disk.write(path, json.dumps(tree, indent=1, sort_keys=True).encode())
            return
        try:
            stored = json.loads(_read(path))
            digest, settings = str(stored["digest"]), dict(stored["settings"])
            self._sealed = bool(stored.get("sealed")) or any(self.folder.glob("*.seal.json"))
        except (ValueError, KeyError, TypeError) as error:
            raise FedsgcgError(damage(path, "not the JSON that was written")) from error
        if digest != self._digest:
            wanted = json.loads(json.dumps(settings_tree))
            raise FedsgcgError(
                *(list(differences(settings, wanted, str(path))) or [_other_plan(path, digest)])
            )

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*.safetensors"), reverse=True)

    def _checkpoint_path(self, number: int) -> Path:
        return self.folder / f"checkpoint-{number:05d}.safetensors"

    def _rows_path(self, number: int) -> Path:
        return self.folder / "rounds" / f"{number:05d}.arrow"

    def _rows_present(self) -> list[int]:
        stems = [path.stem for path in (self.folder / "rounds").glob("*.arrow")]
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _read_checkpoint(self, path: Path) -> tuple[RoundRecord, list[str]]:
        if self._sealed:
            self._check_seal(path)
        record, hashes = decode_checkpoint(path)
        if record.identity.plan != self._digest or self._checkpoint_path(record.round) != path:
            raise FedsgcgError(
                damage(path, f"round {record.round} of plan {record.identity.plan[:12]}")
            )
        if len(hashes) != record.round:
            raise FedsgcgError(damage(path, f"hashes of {len(hashes)} rounds"))
        for number, wanted in enumerate(hashes, start=1):
            self._checked_rows(number, wanted)
        return record, hashes

    def _check_seal(self, path: Path) -> None:
        """Refuse a checkpoint without the seal of this run, or that was changed since."""
        seal = _seal_path(path)
        if not seal.is_file():
            raise FedsgcgError(
                damage(path, "no seal, which the other checkpoints of this run have")
            )
        with refusals(path):
            found = broken_seal(self.folder, [path.name], seal.name)
        for name, what in found.items():
            raise FedsgcgError(damage(self.folder / name, what))

    def _checked_rows(self, number: int, wanted: str) -> bytes:
        path = self._rows_path(number)
        if not path.exists():
            raise FedsgcgError(damage(path, "no such file"))
        data = _read(path)
        if _sha(data) != wanted:
            raise FedsgcgError(
                damage(path, f"SHA-256 {_sha(data)[:12]}… instead of {wanted[:12]}…")
            )
        return data

    def _tidy(self, done: int) -> None:
        stale = [self._rows_path(number) for number in self._rows_present() if number > done]
        intact = [path for path in self._checkpoints() if path <= self._checkpoint_path(done)]
        stale += [path for path in self._checkpoints() if path not in intact[:CHECKPOINTS_KEPT]]
        kept = {_seal_path(path) for path in intact[:CHECKPOINTS_KEPT]}
        stale += [path for path in self.folder.glob("*.seal.json") if path not in kept]
        stale += [*self.folder.glob(".*.tmp"), *(self.folder / "rounds").glob(".*.tmp")]
        for path in stale:
            self._disk.discard(path)


def decisive_settings(plan: Plan) -> dict[str, Any]:
    """Return the settings covered by the plan's digest: all but paths, devices and run name."""
    tree = plan.to_tree()
    for name in NOT_DECISIVE:
        tree.pop(name)
    tree["data"].pop("root")
    return tree


def lock_file(path: Path, *, shared: bool = False, wait_s: float = 0.0) -> TextIO:
    """Lock a file for this process until the returned file is closed.

    Args:
        path: The file, made if it does not exist. It holds the number of the process.
        shared: Several processes may hold the lock as `shared` at the same time.
        wait_s: Longest time in seconds to wait for the lock.

    Raises:
        FedsgcgError: CFG-006 with the process that holds the lock, CFG-008 when the file system has
            no locks, SRV-401 when the file cannot be written.
    """
    with refusals(path):
        file = path.open("a+")
    try:
        with refusals(path):
            free = _locked(file, shared, wait_s)
    except FedsgcgError:
        file.close()
        raise
    if not free:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        action = "wait for it to end, or choose another output=FOLDER"
        raise fail("CFG-006", where=str(path.parent), found=f"process {holder}", action=action)
    with refusals(path):
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    return file


def _locked(file: TextIO, shared: bool, wait_s: float) -> bool:
    """Try to lock an open file, again until `wait_s` seconds have passed."""
    deadline = time.monotonic() + wait_s
    action = "Choose an output=FOLDER on a local disk."
    while not (free := lock(file, action=action, shared=shared)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return free


def differences(before: Any, now: Any, where: str, path: str = "") -> list[Problem]:
    """List the leaves in which two settings trees differ, as CFG-005 problems."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = sorted({*before, *now})
        problems: list[Problem] = []
        for name in names:
            inner = f"{path}.{name}".lstrip(".")
            problems += differences(before.get(name), now.get(name), where, inner)
        return problems
    if before == now:
        return []
    action = "use the first run's settings, or choose another output=FOLDER"
    return [
        Problem(
            "CFG-005",
            where=where,
            found=f"{path}={now!r}",
            expected=f"{path}={before!r}",
            action=action,
        )
    ]


def _seal_path(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".seal.json")


def _other_plan(path: Path, digest: str) -> Problem:
    return Problem(
        "CFG-005",
        where=str(path),
        found=f"plan {digest[:12]}",
        action="choose another output=FOLDER",
    )


def _read(path: Path) -> bytes:
    with refusals(path):
        return path.read_bytes()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
