"""What this site released, so that releases cannot be subtracted from each other.

Two sums over patients who differ by one give that patient exactly, however large both samples are.
The site therefore keeps a list of the samples that its releases covered, and refuses a sample if
some combination of releases could isolate fewer patients than the floor (matrix row 62).

Consider the patients that appear in the same releases: no weighted sum of releases treats them
differently, so it covers all of them or none. If every such group has at least as many patients as
the floor, so has everything that can be computed from the releases. A study of many rounds, folds
and methods uses the same samples again and again, and a repeated sample changes no group.

The list is an append-only file of JSON lines at the site. Patients appear in it as keyed hashes of
their id and images, so that a corrected mask counts as another patient.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

from fedsgcg.clients.data.store import CaseStore, fingerprint
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.system import lock
from fedsgcg.common.secure_sums.history import check_sums

FILE: Final = "releases.jsonl"
TRAINING: Final = "training"
EVALUATION: Final = "evaluation"
"""Kinds of samples. Figures of validation and test cases are the same function of a patient, so
they are compared with each other; a class has a kind of its own (`class_kind`)."""

Members = frozenset[str]


@dataclass(frozen=True)
class Sample:
    """The patients that a release covers.

    Attributes:
        kind: `TRAINING`, `EVALUATION` or the kind of a class; only samples of one kind can be
            subtracted from each other.
        key: Digest of the data and of the settings that select the patients. An accepted key is
            accepted again without reading the patients.
        members: Returns one keyed hash for each patient.
    """

    kind: str
    key: str
    members: Callable[[], Members]


def class_kind(labels: Iterable[int]) -> str:
    """Return the kind of a class's samples: its label values, whatever its name."""
    return f"class {sorted(labels)}"


def sample_key(stores: Sequence[CaseStore], part: str, *settings: object) -> str:
    """Return the key of a sample: the data of some hospitals, their part and further settings."""
    text = json.dumps([*(fingerprint(store) for store in stores), part, *settings])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def members_of(
    stores: Sequence[CaseStore], chosen: Collection[tuple[str, int]], salt: bytes
) -> Members:
    """Return a keyed hash (32 hex digits) of each patient with chosen cases, and of these cases.

    Args:
        stores: The cases of each of the site's hospitals.
        chosen: (hospital, case index) of the cases of the sample.
        salt: The site's secret.
    """
    cases: dict[tuple[str, str], list[str]] = defaultdict(list)
    for store in stores:
        for case in store.cases:
            if (store.site, case.index) in chosen:
                mask = hashlib.blake2b(store.truth(case).tobytes(), digest_size=16)
                content = f"{case.content or case.name} {mask.hexdigest()}"
                cases[store.site, case.patient].append(content)
    return frozenset(
        hashlib.blake2b(
            json.dumps([patient, sorted(found)]).encode(), digest_size=16, key=salt
        ).hexdigest()
        for patient, found in cases.items()
    )


def smallest_group(earlier: Iterable[Members], new: Members) -> int:
    """Return the number of patients in the smallest group that releases could isolate.

    A group consists of the patients that appear in the same samples.

    Returns:
        The smallest size; 0 if there is no patient at all.
    """
    samples = [*earlier, new]
    patterns = Counter(
        tuple(patient in sample for sample in samples) for patient in frozenset().union(*samples)
    )
    return min(patterns.values(), default=0)


def remember(home: Path, samples: Sequence[Sample], floor: int) -> list[bool]:
    """Accept the samples that cannot isolate fewer patients than the floor, and record them.

    Args:
        home: The site's folder.
        samples: The samples of one release; each is judged by itself.
        floor: Fewest patients that a group may have.

    Returns:
        For each sample whether it was accepted. A sample of fewer patients than the floor is not.

    Raises:
        FedsgcgError: SITE-501 when the list cannot be read or written.
    """
    with _Log(home / FILE) as log:
        return [_accept(log, sample, floor) for sample in samples]


def spend(home: Path, kind: str, request: str, budget: int) -> None:
    """Count a release; a repeated request, as after a restart, counts once.

    Args:
        home: The site's folder.
        kind: What is counted.
        request: Digest of the request that is answered.
        budget: Most releases of this kind.

    Raises:
        FedsgcgError: POL-721 when the budget is spent, SITE-501 when the list cannot be read or
            written.
    """
    with _Log(home / FILE) as log:
        known = {line["request"] for line in log.lines if line.get("counts") == kind}
        if request in known:
            return
        if len(known) >= budget:
            raise fail(
                "POL-721",
                where=str(home / FILE),
                found=f"{len(known)} {kind}",
                expected=f"at most {budget}",
                action=f"ask the hospital to raise {kind} in its site.yaml",
            )
        log.append({"counts": kind, "request": request})


def check_session(home: Path, session: str) -> None:
    """Refuse a secure sum whose identifier was used before; raises PRV-959, SITE-501."""
    with _Log(home / FILE) as log:
        _refuse_repeated(log, session)


def remember_sum(
    home: Path, session: str, reference: str, sites: Collection[str], fewest: int
) -> None:
    """Record a secure sum before this site gives its shares; refuse one that isolates few sites.

    Args:
        home: The site's folder.
        session: Identifier of the sum.
        reference: Digest of what is summed (`common.secure_sums.history`).
        sites: The sites whose numbers are summed.
        fewest: Fewest sites that a group may have.

    Raises:
        FedsgcgError: PRV-954 for a sum that, with earlier ones of the same reference, isolates
            fewer; PRV-959 for one that was opened before; SITE-501 when the list cannot be read or
            written.
    """
    with _Log(home / FILE) as log:
        _refuse_repeated(log, session)
        check_sums(
            (line["sites"] for line in log.lines if line.get("sum") == reference), sites, fewest
        )
        log.append({"sum": reference, "session": session, "sites": sorted(sites)})


def _refuse_repeated(log: _Log, session: str) -> None:
    if any(line.get("session") == session for line in log.lines):
        raise fail("PRV-959", found="a sum that this site has opened", expected="a new sum")


def refused_sample(kind: str, floor: int) -> FedsgcgError:
    """Return the error for a sample that was not accepted."""
    return fail(
        "POL-720",
        found=f"a sample ({kind}) that has, or differs from earlier ones by, fewer patients",
        expected=f"{floor} patients or more (patient_floor)",
        action="add the new or corrected patients to the data in groups of at least "
        f"{floor}; patients of an earlier release stay as they were",
    )


def _accept(log: _Log, sample: Sample, floor: int) -> bool:
    mine = [line for line in log.lines if line.get("sample") == sample.kind]
    if any(line["key"] == sample.key for line in mine):
        return True
    members = sample.members()
    earlier = [frozenset(line["members"]) for line in mine]
    if not members or smallest_group(earlier, members) < floor:
        return False
    log.append({"sample": sample.kind, "key": sample.key, "members": sorted(members)})
    return True


class _Log:
    """The locked list: its lines, and `append`, which is on the disk before it returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []

    def __enter__(self) -> _Log:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file: FileIO = self._path.open("a+b", buffering=0)
            lock(self._file, wait=True, action="Set home in site.yaml to a folder on a local disk.")
            self._read()
        except OSError as error:
            raise self._failed(str(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        """Append a line; a partial line is removed again."""
        end, data = self._file.seek(0, os.SEEK_END), (json.dumps(line) + "\n").encode()
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            raise self._failed(str(error)) from error
        self.lines.append(line)

    def _read(self) -> None:
        """Read the lines; an incomplete last one is the result of a crash and is removed."""
        self._file.seek(0)
        content = self._file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            self._file.truncate(complete)
        try:
            self.lines = [_checked(json.loads(line)) for line in content[:complete].splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            self._file.close()
            raise self._failed("a line that cannot be read") from error

    def _failed(self, found: str) -> FedsgcgError:
        return fail(
            "SITE-501",
            where=str(self._path),
            found=found,
            expected="the list of what this site released",
            action="free disk space, correct the permissions, or restore the file from a backup",
        )


def _checked(line: Any) -> dict[str, Any]:
    """Return a line with the fields that it must have."""
    if "sample" in line:
        return {**line, "key": str(line["key"]), "members": _texts(line["members"])}
    if "sum" in line:
        return {**line, "session": str(line["session"]), "sites": _texts(line["sites"])}
    return {**line, "counts": str(line["counts"]), "request": str(line["request"])}


def _texts(values: Collection[Any]) -> list[str]:
    if not isinstance(values, list):
        raise TypeError("not a list")
    return [str(value) for value in values]
