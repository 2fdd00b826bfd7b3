"""`predict --adapt`: adapts a model to the images that are predicted, before the first of them.

All images are read once to measure them; none of their masks is. An image that cannot be used is
left out here and reported when it is predicted.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fedsgcg.clients.adaptation import Reference, adapted, hospital_batches
from fedsgcg.clients.data.slices import Slices, to_slices
from fedsgcg.clients.data.store import SliceTable
from fedsgcg.clients.predict.files import Job
from fedsgcg.clients.predict.model import Model
from fedsgcg.clients.predict.record import contents
from fedsgcg.common.console import Screen, counted
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.images.read import check_image, read_volume
from fedsgcg.common.names import number_of
from fedsgcg.common.settings.adaptation import AMPLITUDE, BATCHNORM, AdaptSettings


def check_adapt(options: argparse.Namespace, model: Model) -> None:
    """Refuse an adaptation that the model does not allow; raises MOD-820 or CFG-001."""
    if not 0 <= options.adapt_share <= 1:
        found = f"{options.adapt_share:g}"
        raise fail("CFG-001", where="--adapt-share", found=found, expected="a share in [0, 1]")
    if not options.adapt:
        return
    where = str(options.model)
    if options.adapt == AMPLITUDE:
        raise fail(
            "MOD-820",
            where=where,
            found="a model without the training hospitals' mean amplitude",
            expected="batchnorm or prototypes: the hospitals share their amplitudes within the "
            "federation, and a model may go anywhere",
            action="Use --adapt batchnorm or prototypes, omit --adapt, or have the federation "
            "evaluate this hospital with adapt.by=[amplitude].",
        )
    if options.adapt == BATCHNORM:
        layers = [
            layer
            for layer in model.network.modules()
            if isinstance(layer, _BatchNorm) and layer.track_running_stats
        ]
        if not layers:
            raise fail(
                "MOD-820",
                where=where,
                found="a network without BatchNorm layers",
                expected="BatchNorm layers, whose moments are adapted",
                action="Use --adapt prototypes, or omit --adapt.",
            )
    elif model.prototypes is None:
        raise fail(
            "MOD-820",
            where=where,
            found="a model without prototypes",
            expected="prototypes.arrow of a method with class statistics",
            action="Use --adapt batchnorm, or omit --adapt.",
        )


def images_digest(jobs: Iterable[Job]) -> str:
    """Return a digest of the images to which a model is adapted, as all decide every result."""
    lines = sorted(f"{job.name} {contents(job, masks=False)}" for job in jobs)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def adapted_model(
    options: argparse.Namespace,
    model: Model,
    jobs: Sequence[Job],
    device: torch.device,
    console: Screen,
) -> Iterator[Model]:
    """Yield the model adapted to the images of some jobs, or as it is without `--adapt`.

    Raises:
        FedsgcgError: MOD-820 when no image can be read.
    """
    if not options.adapt:
        yield model
        return
    number = number_of(len(jobs), "image")
    console.print(
        f"adapting {options.adapt} to {number} (transductive): every prediction depends on all of "
        "them",
        style="yellow",
    )
    table = _table(jobs, model, console)
    network = model.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = AdaptSettings(by=(options.adapt,), share=options.adapt_share)
    reference = Reference(model.prototypes, model.normalize)
    batches = partial(hospital_batches, table)
    with adapted(
        network, options.adapt, batches, settings, model.data, reference, device
    ) as changed:
        yield replace(model, network=changed)


def _table(jobs: Sequence[Job], model: Model, console: Screen) -> SliceTable:
    """Return the slices of all usable images, without what only scores and pictures need."""
    stored: list[Slices] = []
    items = counted(jobs, console, "measuring") if console.redraws else iter(jobs)
    for job in items:
        try:
            volume = read_volume(job.image)
            check_image(volume, str(job.image))
        except FedsgcgError:
            continue  # reported as MOD-810 when its turn to be predicted comes
        if volume.kind not in model.kinds:
            continue
        native = volume.array.shape[-2:]
        depth = 1 if volume.is_picture else volume.array.shape[0]
        slices = to_slices(volume, np.zeros((depth, *native), np.uint8), model.data)
        none = np.zeros((0, 0, 0), np.uint8)
        stored.append(replace(slices, truth=none, display=none))
    if not stored:
        raise fail(
            "MOD-820",
            found="no image that can be read",
            expected="images of the kind that the model was trained on",
            action="Omit --adapt to see what is wrong with each image.",
        )
    depths = [len(slices.label) for slices in stored]
    return SliceTable(
        np.repeat(np.arange(len(stored)), depths),
        np.concatenate([np.arange(depth) for depth in depths]),
        np.zeros(sum(depths), np.bool_),
        model.data.stack,
        tuple(stored),
    )
