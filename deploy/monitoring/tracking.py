"""Writes a study to experiment trackers while it runs (`tracking=[tensorboard,mlflow]`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedsgcg.common.console import Screen, steps_of
from fedsgcg.common.errors import FedsgcgError, Problem, fail

if TYPE_CHECKING:
    from fedsgcg.server.telemetry.tracking import Tracker

PACKAGES: Final = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
"""Tracker -> module of its library, which has the name of the extra."""

EVENT_FILES: Final = "tensorboard"
STORE: Final = "mlflow.db"
ARTIFACTS: Final = "mlflow"
"""Names in the folder of a study."""


@contextmanager
def tracked_study(
    folder: Path,
    cells: Sequence[tuple[str, Path, Mapping[str, Any]]],
    names: Sequence[str],
    mlflow_uri: str,
    console: Screen,
) -> Iterator[None]:
    """Write the curves of a study while the block runs, if its settings ask for it.

    A tracker that does not work is a warning (MON-912, MON-913) and changes nothing in the block.

    Args:
        folder: Folder of the study.
        cells: Name, folder and settings of each federation.
        names: The trackers.
        mlflow_uri: MLflow store; "" = in the study's folder.
        console: For the warnings.

    Raises:
        FedsgcgError: MON-901 without a tracker's extra, before the block starts.
    """
    if not names:
        yield
        return
    check_packages(names)
    from fedsgcg.server.telemetry.tracking import Tracking, runs_of

    def warn(problem: Problem) -> None:
        console.print(str(problem), style="yellow")
        console.event("warning", **asdict(problem))

    running = [
        Tracking(name, _maker(name, folder, mlflow_uri), runs_of(folder, cells), warn)
        for name in names
    ]
    for tracking in running:
        tracking.start()
    try:
        yield
    finally:
        with steps_of(console, "writing the curves") as step:
            for name, tracking in zip(names, running, strict=True):
                step(name)
                tracking.stop()


def check_packages(names: Sequence[str]) -> None:
    """Raise MON-901 for every tracker whose library is not installed."""
    missing = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise FedsgcgError(
            *(
                fail(
                    "MON-901",
                    where=f"tracking={name}",
                    found=f"no {name}",
                    expected=f"the extra `{name}`",
                    action=f"pip install 'fedsgcg[{name}]'",
                ).problems[0]
                for name in missing
            )
        )


def _maker(name: str, folder: Path, mlflow_uri: str) -> Callable[[], Tracker]:
    def tensorboard() -> Tracker:
        from fedsgcg.server.telemetry.tensorboard import TensorBoard

        return TensorBoard(folder / EVENT_FILES)

    def mlflow() -> Tracker:
        from fedsgcg.server.telemetry.mlflow import MLflow

        local = f"sqlite:///{folder / STORE}"
        return MLflow(mlflow_uri or local, folder.name, (folder / ARTIFACTS).as_uri())

    return {"tensorboard": tensorboard, "mlflow": mlflow}[name]
