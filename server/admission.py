"""Admission: every payload is checked before any of it reaches the global model.

A rejected payload is recorded with its code, and the round continues with the others as long as the
quorum holds. Pure NumPy. Legend: K classes incl. background, A feature channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.learnable import learnable
from fedsgcg.common.wire.norm_moments import VARIANCE, NormMoments, norm_layers
from fedsgcg.common.wire.payload import Identity, Weights

SYMMETRY: Final = 1e-9
"""Largest |M_ij - M_ji| relative to the largest entry.

Allows for float64 round-off of a sum over millions of pixels.
"""

NEGATIVE_EIGENVALUE: Final = 1e-5
"""Most negative eigenvalue relative to the trace; a site may sum in float32 on its device."""

UNIT_NORM: Final = 1e-3
"""Tolerance above one of the mean squared length of unit-length features.

Features in bfloat16 have about three significant digits.
"""

MAX_COUNT: Final = 2.0**53
"""Largest number of pixels: integers up to it are exact in float64."""

MAX_STEPS: Final = 10**9
"""Most steps of a site in one round: a BatchNorm counter grows by no more. A fixed bound would let
one site raise the merged counter so far that the next honest increment exceeds it."""

MAX_FEATURE: Final = 1e5
"""Largest root mean square of a feature channel, where features do not have unit length."""

MAX_MOMENT: Final = 1e6
"""Largest mean of the input of a BatchNorm layer; its variance is at most the square."""

PASSES: Final = 2.0
"""A pass over a site's slices may count a slice again to complete a batch, at most this often."""

MAX_GRADIENT: Final = 1e6
"""Largest magnitude of a mean gradient: Adam's steps do not depend on its size, other steps do."""

MAX_WEIGHT: Final = 1e9
"""Largest magnitude of a weight: its square and sums of such squares stay finite in float32."""

LEAST_NORM: Final = 1e-3
"""Smallest norm of a model relative to the received one; no round of training shrinks it so far."""

METRIC_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "examples": (0.0, 1e9),
    "steps": (0.0, 1e9),
    "micro_batches": (1.0, 1e6),
    "seconds": (0.0, 1e7),
    "learning_rate": (0.0, 1e3),
    "validation_dice": (0.0, 1.0),
    "validation_cases": (0.0, 1e6),
    "validation_dice_trained": (0.0, 1.0),
    "validation_dice_without": (0.0, 1.0),
    "epsilon": (0.0, 1e9),
}
"""Possible values of the metrics of a site; a loss and its parts are within +-MAX_LOSS."""

MAX_LOSS: Final = 1e9


class Payload(Protocol):
    """The part of a site's reply that admission reads (`common.wire.messages.Reply` is one)."""

    @property
    def identity(self) -> Identity:
        """Run, fold, round and plan stated by the payload."""

    @property
    def site(self) -> str:
        """Site stated by the payload."""

    @property
    def weights(self) -> Weights | None:
        """Locally trained model."""

    @property
    def statistics(self) -> ClassStatistics | None:
        """Class statistics."""

    @property
    def moments(self) -> NormMoments | None:
        """Moments of the BatchNorm layers' inputs."""

    @property
    def control_variates(self) -> npt.NDArray[np.float32] | None:
        """SCAFFOLD's control variate of the site."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics; `examples` is the number of training slices."""


@dataclass(frozen=True)
class Expectation:
    """What a payload must match to be admitted.

    Attributes:
        identity: Identity of the request that it answers.
        site: Site that enrolled from the node that answered.
        reference: Global model whose names and shapes the weights must have; None when no weights
            are expected.
        statistics_shape: (K, A) of the statistics; None when none are expected.
        unit_norm: Whether the statistics describe unit-length features.
        max_examples: Training slices that the site declared at enrolment, at most its limit; 0 =
            unknown.
        max_cases: Validation cases, in the same way; None = unknown.
        max_pixels: Pixels that a pass over its slices has at most; None = unknown.
        measured: Model whose BatchNorm layers the moments must describe; None when no moments are
            expected.
        labelled: Whether the site trains with labels. One that does not sends weights, moments and
            statistics of projections, and nothing that is made from masks.
        control_variates: Whether the site's control variate is expected.
    """

    identity: Identity
    site: str
    reference: Weights | None = None
    statistics_shape: tuple[int, int] | None = None
    unit_norm: bool = False
    max_examples: int = 0
    max_cases: int | None = None
    max_pixels: float | None = None
    measured: Weights | None = None
    labelled: bool = True
    control_variates: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a payload was admitted.

    Attributes:
        site: The site.
        accepted: True if admitted, False if rejected.
        code: Error code of a rejection, "" otherwise.
        detail: What was found, for the coordinator's log; never text sent by a site.
    """

    site: str
    accepted: bool
    code: str = ""
    detail: str = ""


def admit(payload: Payload, expectation: Expectation) -> Verdict:
    """Check a payload; the first rule that it breaks gives the verdict.

    | code | reason |
    | --- | --- |
    | PAY-120 | another identity or site |
    | PAY-103 | wrong names or shapes of the weights |
    | PAY-101 | weights that are not finite |
    | PAY-110 | a number of examples that is not a positive integer |
    | PAY-111 | more examples than the site has |
    | PAY-112 | a weight, counter or metric outside its range |
    | ROL-212 | class statistics or a validation result of a site without labels |
    | PAY-121 | control variates that are missing or impossible |
    | STA-201 | class statistics that are missing or impossible |
    | STA-202 | moments of the BatchNorm layers that are missing or impossible |
    """
    for code, find in RULES.items():
        if detail := find(payload, expectation):
            return Verdict(expectation.site, False, code, detail)
    return Verdict(expectation.site, True)


def _foreign(payload: Payload, expectation: Expectation) -> str:
    found, wanted = payload.identity, expectation.identity
    if found.round != wanted.round:
        return f"round {found.round} instead of {wanted.round}"
    other = [
        name for name in ("run", "heldout", "plan") if getattr(found, name) != getattr(wanted, name)
    ]
    if payload.site != expectation.site:
        other.append("site")
    return f"another {' and another '.join(other)}" if other else ""


def _misshapen(payload: Payload, expectation: Expectation) -> str:
    if expectation.reference is None:
        return ""
    if payload.weights is None:
        return "no weights"
    wanted, found = dict(expectation.reference.layout), dict(payload.weights.layout)
    for name in sorted(wanted):
        if wanted[name] != found.get(name):
            return f"{name!r}: shape {found.get(name, 'absent')} instead of {wanted[name]}"
    if unknown := set(found) - set(wanted):
        return f"{len(unknown)} entries that the network does not have"
    # Equal dictionaries may still hide another order or a duplicate name, and either would make the
    # flat array be read wrongly.
    if payload.weights.layout != expectation.reference.layout:
        return "the entries in another order, or a duplicate entry"
    if [name for name, _ in payload.weights.counters] != [
        name for name, _ in expectation.reference.counters
    ]:
        return "other counters"
    return ""


def _not_finite(payload: Payload, expectation: Expectation) -> str:
    if (
        expectation.reference is None
        or payload.weights is None
        or np.isfinite(payload.weights.values).all()
    ):
        return ""
    state = payload.weights.to_state()
    broken = [name for name, array in state.items() if not np.isfinite(array).all()]
    return f"{len(broken)} entries that are not finite, the first is {broken[0]!r}"


def _miscounted(payload: Payload, expectation: Expectation) -> str:
    if expectation.reference is None:
        return ""
    examples = payload.metrics.get("examples", float("nan"))
    return "" if examples > 0 and float(examples).is_integer() else f"{examples!r} examples"


def _overcounted(payload: Payload, expectation: Expectation) -> str:
    cases, most = payload.metrics.get("validation_cases", 0.0), expectation.max_cases
    if most is not None and cases > most:
        return f"{cases:g} validation cases, but the site enrolled with {most}"
    if expectation.reference is None or not expectation.max_examples:
        return ""
    examples = payload.metrics["examples"]
    if examples <= expectation.max_examples:
        return ""
    return f"{examples:.0f} examples, but the site enrolled with {expectation.max_examples}"


def _out_of_range(payload: Payload, expectation: Expectation) -> str:
    for name, value in payload.metrics.items():
        low, high = METRIC_RANGES.get(name, (-MAX_LOSS, MAX_LOSS))
        if (name in METRIC_RANGES or name.startswith("loss")) and not low <= value <= high:
            return f"a metric of {value:g}, expected {low:g} to {high:g}"
    if expectation.reference is None or payload.weights is None:
        return ""
    before = dict(expectation.reference.counters)
    if any(not 0 <= value <= before[name] + MAX_STEPS for name, value in payload.weights.counters):
        return f"a counter that is negative or grew by more than {MAX_STEPS:.0e}"
    if np.abs(payload.weights.values).max(initial=0.0) > MAX_WEIGHT:
        return f"a weight larger than {MAX_WEIGHT:g}"
    for name, array in payload.weights.to_state().items():
        if name.endswith(VARIANCE) and (array < 0).any():
            return "a negative running variance"
    before_norm, norm = _norm(expectation.reference), _norm(payload.weights)
    if norm < LEAST_NORM * before_norm:
        return f"weights of norm {norm:.2g}, those of the received model have {before_norm:.2g}"
    return ""


def _norm(weights: Weights) -> float:
    """Norm of the learnable weights, in float64."""
    values = weights.values[learnable(weights)].astype(np.float64)
    return float(np.sqrt(values @ values))


def _needs_labels(payload: Payload, expectation: Expectation) -> str:
    if expectation.labelled:
        return ""
    if payload.statistics is not None and expectation.statistics_shape is None:
        return "class statistics"
    named = [name for name in payload.metrics if name.startswith("validation_")]
    return f"the metric {named[0]}" if named else ""


def _wrong_control(payload: Payload, expectation: Expectation) -> str:
    if not expectation.control_variates or expectation.reference is None:
        return ""
    found, wanted = payload.control_variates, int(learnable(expectation.reference).sum())
    if found is None:
        return "no control variates"
    if found.shape != (wanted,):
        return f"control variates of shape {found.shape} instead of ({wanted},)"
    if not np.isfinite(found).all():
        return "control variates that are not finite"
    if np.abs(found).max(initial=0.0) > MAX_GRADIENT:
        return f"a mean gradient larger than {MAX_GRADIENT:g}"
    return ""


def _impossible(payload: Payload, expectation: Expectation) -> str:
    if expectation.statistics_shape is None:
        return ""
    statistics = payload.statistics
    if statistics is None:
        return "no class statistics"
    if statistics.mean.shape != expectation.statistics_shape:
        return (
            f"statistics of shape {statistics.mean.shape} instead of {expectation.statistics_shape}"
        )
    if not all(
        np.isfinite(array).all()
        for array in (statistics.count, statistics.mean, statistics.scatter)
    ):
        return "statistics that are not finite"
    if (statistics.count < 0).any() or (statistics.count % 1 != 0).any():
        return "a pixel count that is negative or not an integer"
    if (statistics.count > MAX_COUNT).any():
        return "a pixel count larger than 2^53"
    if expectation.max_pixels is not None and statistics.count.sum() > expectation.max_pixels:
        return f"{statistics.count.sum():.3g} pixels, at most {expectation.max_pixels:.3g} expected"
    return _impossible_scatter(statistics, expectation.unit_norm)


def _impossible_scatter(statistics: ClassStatistics, unit_norm: bool) -> str:
    scatter = statistics.scatter
    size = np.abs(scatter).max(axis=(1, 2), initial=0.0)
    if (
        np.abs(scatter - scatter.transpose(0, 2, 1)).max(axis=(1, 2), initial=0.0) > SYMMETRY * size
    ).any():
        return "a scatter matrix that is not symmetric"
    trace = np.trace(scatter, axis1=1, axis2=2)
    # The matrices are scaled so that their eigenvalues neither overflow nor underflow.
    scale = np.maximum(size, np.finfo(np.float64).tiny)
    lowest = np.linalg.eigvalsh(scatter / scale[:, None, None]).min(axis=1, initial=0.0)
    if (lowest < -NEGATIVE_EIGENVALUE * np.maximum(trace / scale, 0.0)).any():
        return "a scatter matrix with a negative eigenvalue"
    # E|x|^2 = |mean|^2 + tr(covariance), which is at most one for unit-length features.
    with np.errstate(over="ignore"):
        square = np.einsum("ka,ka->k", statistics.mean, statistics.mean) + trace / np.maximum(
            statistics.count, 1.0
        )
    seen = statistics.count > 0
    if not np.isfinite(square).all():
        return "features too large to be pooled"
    if unit_norm and (square[seen] > 1.0 + UNIT_NORM).any():
        return f"features of mean squared length {square[seen].max():.3g}, expected unit length"
    if (square > statistics.num_features * MAX_FEATURE**2).any():
        return f"features with a root mean square above {MAX_FEATURE:g}"
    return ""


def _impossible_moments(payload: Payload, expectation: Expectation) -> str:
    if expectation.measured is None:
        return ""
    moments, layers = payload.moments, norm_layers(expectation.measured)
    if moments is None:
        return "no moments of the normalisation layers"
    if dict(moments.layers) != layers or list(moments.layers) != list(layers):
        return (
            f"moments of {len(moments.layers)} layers that are not the {len(layers)} of the model"
        )
    if not all(
        np.isfinite(array).all() for array in (moments.count, moments.mean, moments.scatter)
    ):
        return "moments that are not finite"
    if (moments.count < 2).any() or (moments.count % 1 != 0).any():
        return "a number of values that is below two or not an integer"
    if (moments.count > MAX_COUNT).any():
        return "a number of values larger than 2^53"
    if expectation.max_pixels is not None and (moments.count > expectation.max_pixels).any():
        return f"more values than the {expectation.max_pixels:.3g} pixels expected at most"
    if (moments.scatter < 0).any():
        return "a negative variance"
    largest = max(np.abs(moments.mean).max(initial=0.0), np.sqrt(moments.variance).max(initial=0.0))
    if largest > MAX_MOMENT:
        return f"a mean or standard deviation larger than {MAX_MOMENT:g}"
    return ""


RULES: Final[Mapping[str, Callable[[Payload, Expectation], str]]] = {
    "PAY-120": _foreign,
    "PAY-103": _misshapen,
    "PAY-101": _not_finite,
    "PAY-110": _miscounted,
    "PAY-111": _overcounted,
    "PAY-112": _out_of_range,
    "ROL-212": _needs_labels,
    "PAY-121": _wrong_control,
    "STA-201": _impossible,
    "STA-202": _impossible_moments,
}
