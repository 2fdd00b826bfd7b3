"""Run studies and read what they wrote."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import fail
from fedsgcg.common.run_folder import paths
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.deploy.study.run import run_study
from fedsgcg.deploy.study.summary import STATUS


@dataclass(frozen=True)
class StudyOutcome:
    """How a study ended.

    Attributes:
        folder: Run folder, with `report.html`, `results.parquet` and one folder per cell.
        status: `completed`, `degraded` (some round missed a site) or `failed`.
        cells: Folder of each cell: one federation of a method, a held-out hospital and a seed.
    """

    folder: Path
    status: str
    cells: tuple[Path, ...]


@dataclass(frozen=True)
class Report:
    """What the report of a study says, as tables.

    Attributes:
        folder: Run folder.
        status: `completed`, `degraded`, `incomplete` or `failed`.
        summary: One row per method, hospital and structure, and one for the average hospital: mean,
            standard deviation, 95 % interval and number of cases left out for each metric. The
            columns state their unit.
        protocol: Who trained, who judged, by which rules, on what machine: topic -> lines.
        problems: Files that could not be read.
    """

    folder: Path
    status: str
    summary: pa.Table
    protocol: dict[str, list[str]]
    problems: tuple[str, ...]


def study(settings: Sequence[str], *, quiet: bool = False) -> StudyOutcome:
    """Run a study, or resume one: the same settings continue in the same folder.

    Args:
        settings: As on the command line of `fedsgcg study`, for example
            `["experiment=demo", "heldout=all"]`.
        quiet: Print warnings and errors only.

    Raises:
        FedsgcgError: Settings or data that cannot be used, with every problem at once.
    """
    if isinstance(settings, str):
        raise fail(
            "CFG-001",
            where="settings",
            found=repr(settings),
            expected="a list of texts, one for each setting",
            action=f"write {settings.split()}",
        )
    planned = plan_study(settings)
    code = run_study(planned, Screen(sys.stdout, quiet=quiet))
    cells = tuple(Path(cell.folder) for cell in planned.cells)
    return StudyOutcome(planned.folder, STATUS[code], cells)


def read_results(folder: str | Path) -> pa.Table:
    """Read `results.parquet` of a study or of one cell: one row per case and structure.

    The schema's metadata gives meaning and unit of each column; `.to_pandas()` needs pandas.

    Raises:
        FedsgcgError: SRV-402 when the folder has no results.
    """
    path = Path(folder) / paths.RESULTS
    try:
        return pq.read_table(path)
    except FileNotFoundError as error:
        expected = "the folder of a study or of one cell"
        found = "no results.parquet" if path.parent.is_dir() else "no such folder"
        raise fail("SRV-402", where=str(folder), found=found, expected=expected) from error


def read_report(folder: str | Path) -> Report:
    """Compute the tables of a study's report from the files of its folder.

    Raises:
        FedsgcgError: SRV-402 when the folder holds neither a study nor a run.
    """
    from fedsgcg.server.report.export import summary_table
    from fedsgcg.server.report.protocol import protocol_box
    from fedsgcg.server.report.study_files import read_study

    files, _ = read_study(Path(folder))
    problems = tuple(str(problem) for problem in files.problems)
    return Report(
        files.folder,
        files.status,
        summary_table(files.results, files.rounds),
        dict(protocol_box(files)),
        problems,
    )
