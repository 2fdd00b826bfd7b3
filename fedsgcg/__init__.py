"""fedsgcg from Python: run studies, read their results, and use trained models.

    import fedsgcg

    outcome = fedsgcg.study(["experiment=demo", "method=source,sgcg", "heldout=all"])
    table = fedsgcg.read_results(outcome.folder)
    model = fedsgcg.load_model(outcome.folder / "sgcg" / "West" / "0")
    prediction = model.predict("case.nii.gz")

Names are loaded on first use, so that the import takes no time.
"""

# In an app bundle, which cannot contain links, the packages are next to this folder. This is the
# first statement because Flower imports `fedsgcg.server` and `fedsgcg.clients` in two threads, and
# Python looks for a subpackage without waiting for an `__init__` that another thread still runs.
__path__.append(__file__.rpartition("/fedsgcg/")[0])

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsgcg.common.errors import FedsgcgError
    from fedsgcg.common.sgcg.loss import sgcg_loss
    from fedsgcg.common.statistics import ClassStatistics
    from fedsgcg.models import SegmentationModel, load_model
    from fedsgcg.studies import Report, StudyOutcome, read_report, read_results, study

if os.path.isdir(f"{__path__[0]}/common"):
    __path__.pop()  # a checkout or an install

__all__ = [
    "ClassStatistics",
    "FedsgcgError",
    "Report",
    "SegmentationModel",
    "StudyOutcome",
    "load_model",
    "read_report",
    "read_results",
    "sgcg_loss",
    "study",
]

_HOMES = {
    "ClassStatistics": "fedsgcg.common.statistics",
    "FedsgcgError": "fedsgcg.common.errors",
    "sgcg_loss": "fedsgcg.common.sgcg.loss",
    "SegmentationModel": "fedsgcg.models",
    "load_model": "fedsgcg.models",
    "Report": "fedsgcg.studies",
    "StudyOutcome": "fedsgcg.studies",
    "read_report": "fedsgcg.studies",
    "read_results": "fedsgcg.studies",
    "study": "fedsgcg.studies",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fedsgcg")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
