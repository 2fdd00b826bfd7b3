"""I2 and I4: every model and every prototype is computed again from the recorded replies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.nemesis.history import Arrays, Checkpoint, History, Sent, Study, Violation, columns

MOMENTS = ("running_mean", "running_var")
ROUNDING = 1e-6
"""Relative tolerance of statistics that were summed in another order."""


def explained(study: Study, history: History) -> Iterator[Violation]:
    """I2: every model is the merge of the honest replies of the sites of its round.

    After a void round it is the model of the round before.
    """
    models: dict[int, Any] = {}
    for checkpoint in study.checkpoints:
        number = checkpoint.round
        models[number] = checkpoint.tensors["weights"]
        if number in study.void():
            before = models.get(number - 1)
            if before is not None and not np.array_equal(before, models[number]):
                yield Violation("I2", str(checkpoint.path), "a void round changed the model")
            continue
        sites = study.contributors(number)
        offers = [history.of(study, site, "train", number) for site in sites]
        if not sites or not all(offers):
            yield Violation("I2", str(checkpoint.path), f"merged {sites}, recorded {len(offers)}")
            continue
        choices = list(itertools.product(*(unique(replies) for replies in offers)))
        fitting = [choice for choice in choices if merges_to(checkpoint, choice)]
        if not fitting:
            found = f"not the merge of what {', '.join(sites)} sent in round {number}"
            yield Violation("I2", str(checkpoint.path), found)
        elif all(any(reply.poison for reply in choice) for choice in fitting):
            kinds = sorted({reply.poison for reply in fitting[0] if reply.poison})
            yield Violation("I2", str(checkpoint.path), f"a poisoned reply was merged: {kinds}")
        yield from explained_moments(study, history, checkpoint)


def unique(replies: list[Sent]) -> list[Sent]:
    """One of each content: a site may train a round twice, with the same bits."""
    return list({reply.digest(): reply for reply in replies}.values())


def merges_to(checkpoint: Checkpoint, replies: tuple[Sent, ...]) -> bool:
    """Whether the weights are the mean by training slices, to the last bit of float32."""
    layout, merged = checkpoint.layout, checkpoint.tensors["weights"]
    if any(reply.layout["layout"] != layout["layout"] for reply in replies):
        return False
    total = sum(np.longdouble(reply.examples) for reply in replies)
    mean = sum(reply.weights.astype(np.longdouble) * reply.examples for reply in replies) / total
    exact = mean.astype(np.float32)
    below, above = np.nextafter(exact, -np.inf), np.nextafter(exact, np.inf)
    fits = (merged == exact) | (merged == below) | (merged == above)
    counters = {
        name: max(reply.layout["counters"][name] for reply in replies)
        for name in layout["counters"]
    }
    return bool(fits[~moment_places(layout)].all()) and layout["counters"] == counters


def moment_places(layout: dict[str, Any]) -> Any:
    """(P,) whether a weight is a running moment of BatchNorm."""
    flags = [
        np.full(int(np.prod(shape)), name.endswith(MOMENTS)) for name, shape in layout["layout"]
    ]
    return np.concatenate(flags)


def explained_moments(
    study: Study, history: History, checkpoint: Checkpoint
) -> Iterator[Violation]:
    """BatchNorm's moments are those of all inputs of the sites that measured them."""
    sites = sorted(checkpoint.parts())
    offers = [
        [
            reply.table("moments")
            for reply in unique(history.of(study, site, "query.statistics", checkpoint.round))
            if reply.table("moments") and not reply.poison
        ]
        for site in sites
    ]
    state = entries_of(checkpoint)
    for choice in itertools.product(*offers):
        if all(close(state[name], value) for name, value in pooled_moments(choice).items()):
            return
    found = f"moments that {', '.join(sites)} did not measure in round {checkpoint.round}"
    yield Violation("I2", str(checkpoint.path), found)


def entries_of(checkpoint: Checkpoint) -> Arrays:
    """Weights by name."""
    found, start = {}, 0
    for name, shape in checkpoint.layout["layout"]:
        size = int(np.prod(shape))
        found[name] = checkpoint.tensors["weights"][start : start + size].reshape(shape)
        start += size
    return found


def pooled_moments(parts: tuple[Any, ...]) -> Arrays:
    """Mean and unbiased variance of each layer's inputs over several sites."""
    found = {}
    for index, layer in enumerate(parts[0]["layer"]):
        counts = np.array([part["count"][index] for part in parts])
        means = np.array([part["mean"][index] for part in parts])
        scatters = np.array([part["scatter"][index] for part in parts])
        mean = (counts[:, None] * means).sum(0) / counts.sum()
        scatter = scatters.sum(0) + (counts[:, None] * (means - mean) ** 2).sum(0)
        found[f"{layer}.running_mean"] = mean
        found[f"{layer}.running_var"] = scatter / (counts.sum() - 1)
    return found


def close(found: Any, wanted: Any) -> bool:
    """Whether two arrays agree up to rounding, relative to their largest value."""
    wanted = np.asarray(wanted, dtype=float)
    scale = float(np.abs(wanted).max(initial=1e-30))
    return bool(
        np.abs(np.asarray(found, dtype=float) - wanted).max(initial=0.0) <= ROUNDING * scale
    )


def exact_prototypes(study: Study, history: History) -> Iterator[Violation]:
    """I4: statistics are what the sites sent, and the prototypes pool them."""
    for checkpoint in study.checkpoints:
        if checkpoint.round in study.void():
            continue
        for site, part in checkpoint.parts().items():
            replies = history.of(study, site, "query.statistics", checkpoint.round)
            tables = [reply.table("statistics") for reply in replies if not reply.poison]
            if part not in tables:
                found = f"statistics that {site} did not send in round {checkpoint.round}"
                yield Violation("I4", str(checkpoint.path), found)
    path = study.folder / "prototypes.arrow"
    if not path.exists():
        return
    found_table = columns(path.read_bytes())
    done = set(range(1, int(study.outcome["rounds_done"]) + 1)) - study.void()
    last = max(done, default=0)
    offers = {
        site: [
            reply.table("statistics")
            for reply in unique(history.of(study, site, "query.statistics", last))
            if reply.table("statistics") and not reply.poison
        ]
        for site in history.facts["training"]
    }
    present = [tables for tables in offers.values() if tables]
    subsets = [
        choice
        for size in range(1, len(present) + 1)
        for some in itertools.combinations(present, size)
        for choice in itertools.product(*some)
    ]
    if not any(is_pool(found_table, choice) for choice in subsets):
        yield Violation("I4", str(path), "not the pooled statistics of what the sites sent")
    for index, scatter in enumerate(scatters_of(found_table)):
        lowest = np.linalg.eigvalsh(scatter).min() if np.isfinite(scatter).all() else -np.inf
        if lowest < -1e-5 * max(np.trace(scatter), 1e-30):
            yield Violation("I4", str(path), f"class {index}: not finite and positive semidefinite")


def scatters_of(table: Arrays) -> list[Any]:
    """Symmetric scatter matrices (A, A) of each class."""
    found = []
    for packed, mean in zip(table["scatter_upper"], table["mean"], strict=True):
        square = np.zeros((len(mean), len(mean)))
        square[np.triu_indices(len(mean))] = packed
        found.append(square + square.T - np.diag(np.diag(square)))
    return found


def is_pool(table: Arrays, parts: tuple[Any, ...]) -> bool:
    """Whether statistics are those of all pixels of several sites."""
    counts = np.array([part["count"] for part in parts])
    means = np.array([part["mean"] for part in parts])
    scatters = np.array([scatters_of(part) for part in parts])
    total = counts.sum(0)
    if not np.array_equal(total, table["count"]):
        return False
    mean = np.einsum("sk,ska->ka", counts, means) / np.maximum(total, 1.0)[:, None]
    apart = means - mean
    scatter = scatters.sum(0) + np.einsum("sk,ska,skb->kab", counts, apart, apart)
    return close(table["mean"], mean) and close(np.array(scatters_of(table)), scatter)
