"""`fedsgcg-site predict MODEL IMAGE... -o DIR`: use a model on images of this hospital. Nothing leaves it.

Masks get the geometry of their image and the label values of the training masks. The preprocessing, the decisions and
the post-processing are those of evaluation, function by function, so that a score told here is the score told there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clients.data.slices import class_indices
from clients.device import choose_device
from clients.evaluation import BATCH, structure_masks
from clients.guard.contents import TrainedOn
from clients.predict.confidence import Gaussians
from clients.predict.files import (
    Job,
    Passed,
    check_output,
    jobs_of_data,
    jobs_of_images,
    save,
    write,
)
from clients.predict.model import Model, load_model
from clients.predict.overlay import overlay
from clients.predict.predictor import Prediction, Predictor
from clients.predict.scores import Scores
from common.console import Screen, counted
from common.errors import FedsgcgError, Problem, fail
from common.images.contents import TRAINING_IMAGES
from common.images.read import check_geometry, read_volume
from common.images.write import mask_bytes, picture_bytes, wide_bytes, write_like
from common.names import printable


def run_predict(options: argparse.Namespace, console: Screen) -> int:
    """Predict every image; see `clients.predict.options.EXITS` for what is returned."""
    if options.batch is None:
        options.batch = BATCH
    _check(options)
    model = load_model(options.model, options.code)
    gaussians = _gaussians(options, model)
    jobs = (
        jobs_of_data(options.data, model.data, options.site, options.split) if options.data else []
    )
    found, passed = jobs_of_images(options.images, jobs)
    check_output(options.output, found, _endings(options), overwrite=options.overwrite)
    _introduce(options, model, len(found), passed, console)
    device = choose_device(options.device, options.threads)
    wanted = gaussians(device) if gaussians else None
    predictor = Predictor(model, device, options.batch, options.probability, wanted)
    scores, known = Scores(model.data), _trained_on(options, console)
    failed: list[tuple[Job, Problem]] = []
    items = counted(found, console, "predicting") if console.is_terminal else iter(found)
    for number, job in enumerate(items, 1):
        place = f"[{number}/{len(found)}] {job.shown}"
        try:
            line = _one(predictor, job, options, scores, known)
        except FedsgcgError as error:
            failed += [(job, problem) for problem in error.problems]
            line = f"[{error.code}] not predicted"
        except Exception as error:  # whatever one image does to a library, the others are predicted
            seen, action = (
                f"{type(error).__name__}: {error}",
                "Look at the file; the other images are predicted.",
            )
            failed.append((job, Problem("MOD-810", seen, action=action, where=str(job.image))))
            line = "[MOD-810] not predicted"
        style = "yellow" if failed and failed[-1][0] is job else None
        console.print(f"{place}  {line}", style=style)
    return _finish(options, scores, failed, len(found), console)


def _check(options: argparse.Namespace) -> None:
    for name in ("batch", "threads"):
        if getattr(options, name) < 1:
            raise fail(
                "CFG-001",
                where=f"--{name}",
                found=str(getattr(options, name)),
                expected="1 or more",
            )
    if (options.site or options.split) and not options.data:
        raise fail("CFG-001", where="--site, --split", found="no --data", expected="--data FOLDER")
    if not options.images and not options.data:
        raise fail(
            "MOD-809",
            found="no IMAGE and no --data",
            expected="images, a folder of images, or --data FOLDER",
        )


def _gaussians(options: argparse.Namespace, model: Model) -> Callable[[Any], Gaussians] | None:
    """Return how to put the prototypes on a device; raises MOD-807 when they are wanted and absent."""
    if not options.confidence:
        return None
    prototypes = model.prototypes
    if prototypes is None:
        found = (
            "prototypes.arrow is not there"
            if model.card.get("prototypes")
            else "a method without statistics"
        )
        action = "Leave --confidence out, or train with method.statistics=true."
        raise fail(
            "MOD-807",
            where=str(options.model),
            found=found,
            expected="prototypes.arrow",
            action=action,
        )
    return lambda device: Gaussians.of(prototypes, device)


def _endings(options: argparse.Namespace) -> tuple[str, ...]:
    wanted = (
        ("_probability", options.probability),
        ("_confidence", options.confidence),
        ("_overlay", options.overlay),
    )
    return ("_mask", *(ending for ending, on in wanted if on))


def _introduce(
    options: argparse.Namespace, model: Model, images: int, passed: Passed, console: Screen
) -> None:
    card = model.card
    trained = ", ".join(card.get("protocol", {}).get("trained", [])) or "unknown hospitals"
    words = f"model {str(card['digest'])[:12]}: {card.get('method', '?')} on {card['data']}, trained at {trained}"
    console.print(f"{words}; {images} images to {options.output}")
    for text in passed.words():
        console.print(f"passed over: {text}", style="dim")


def _trained_on(options: argparse.Namespace, console: Screen) -> TrainedOn | None:
    """Return the images that the model has learned from; where nothing beside it says which, say that of scores."""
    known = TrainedOn.of_model(options.model)
    if known is None and options.data:
        words = (
            f"no {TRAINING_IMAGES} beside the model: cases that it was trained on are not marked"
        )
        console.print(words, style="dim")
    return known


def _one(
    predictor: Predictor,
    job: Job,
    options: argparse.Namespace,
    scores: Scores,
    known: TrainedOn | None,
) -> str:
    """Predict one image, write what is wanted of it, and return a line about it."""
    started = time.monotonic()
    data = predictor.model.data
    try:
        prediction = predictor.predict(job.image)
    except (
        RuntimeError,
        MemoryError,
        ValueError,
    ) as error:  # out of memory, or a size that the network cannot take
        action = "Try a smaller --batch, or --device cpu."
        raise fail(
            "MOD-810", where=str(job.image), found=f"{type(error).__name__}: {error}", action=action
        ) from error
    truth = _truth(job, prediction, predictor.model)
    _write_maps(options.output, job, prediction, list(data.structures))
    words = [_sizes(prediction, predictor.model)]
    if truth is not None:
        words.append(
            scores.add(
                job, prediction, truth, known.hospital_of(prediction.volume) if known else ""
            )
        )
    if prediction.confidence is not None and prediction.masks.any():
        words.append(
            f"confidence {float(prediction.confidence[prediction.masks.any(0)].mean()):.2f}"
        )
    if options.overlay:
        drawn = None if truth is None else structure_masks(truth, data)
        title = f"{job.site} {printable(Path(job.name).name)}  {words[1] if drawn is not None else ''}".strip()
        picture = overlay(prediction, list(data.structures), title, drawn)
        write(job.result(options.output, "_overlay"), picture)
    if known and (hospital := known.hospital_of(prediction.volume)):
        words.append(f"TRAINED ON (at {hospital})")
    return "  ".join([*words, f"{time.monotonic() - started:.1f} s"])


def _truth(job: Job, prediction: Prediction, model: Model) -> Any:
    """Return the true class indices (Z, Y, X), None for an image without a mask."""
    if job.mask is None:
        return None
    mask = read_volume(job.mask, mask=True)
    check_geometry(prediction.volume, mask, str(job.image))
    try:
        return class_indices(mask.array, model.data.classes, str(job.mask))
    except FedsgcgError as error:
        (problem,) = error.problems
        action = "Score it with a model of these labels, or leave --data out."
        where = str(job.mask)
        raise fail(
            "MOD-805", where=where, found=problem.found, expected=problem.expected, action=action
        ) from error


def _write_maps(folder: Path, job: Job, prediction: Prediction, structures: Sequence[str]) -> None:
    """Write the mask and the maps that are there, in the geometry of the image."""
    if not prediction.volume.is_picture:
        for ending, array in (
            ("_mask", prediction.labels),
            ("_probability", _single(prediction.probability)),
            ("_confidence", prediction.confidence),
        ):
            if array is not None:
                target = job.result(folder, ending)
                save(target, lambda path, array=array: write_like(path, array, prediction.volume))  # type: ignore[misc]
        return
    small = prediction.labels.dtype == np.uint8
    contents = {"_mask": (mask_bytes if small else wide_bytes)(prediction.labels[0])}
    if prediction.probability is not None:
        maps = zip(structures, prediction.probability, strict=True)
        contents |= {
            f"_probability_{name}": picture_bytes(_grey(layers[0])) for name, layers in maps
        }
    if prediction.confidence is not None:
        contents["_confidence"] = picture_bytes(_grey(prediction.confidence[0]))
    for ending, content in contents.items():
        write(job.result(folder, ending), content)


def _single(maps: Any) -> Any:
    """One structure needs no fourth axis."""
    return maps[0] if maps is not None and len(maps) == 1 else maps


def _grey(values: Any) -> Any:
    return np.rint(values * 255).astype(np.uint8)


def _sizes(prediction: Prediction, model: Model) -> str:
    """Say how large each structure is."""
    voxel = float(np.prod(prediction.volume.spacing)) / 1000
    parts = []
    for name, mask in zip(model.data.structures, prediction.masks, strict=True):
        pixels = int(mask.sum())
        real = model.data.spacing_unit == "mm" and prediction.volume.millimetres is not None
        size = (
            f"{pixels * voxel:.1f} ml"
            if real
            else f"{pixels} {'pixels' if prediction.volume.is_picture else 'voxels'}"
        )
        parts.append(f"{name} {size}" if pixels else f"{name} not found")
    return ", ".join(parts)


def _finish(
    options: argparse.Namespace,
    scores: Scores,
    failed: Sequence[tuple[Job, Problem]],
    images: int,
    console: Screen,
) -> int:
    """Show the scores and what failed."""
    if scores.rows:
        scores.write(options.output / "scores.csv")
        console.print(scores.table())
        if trained := scores.trained_on():
            words = f"{len(trained)} of {scores.cases()} scored cases are images that the model was trained on or chosen by"
            words += f" ({', '.join(trained[:5])}{', ...' if len(trained) > 5 else ''}): their scores do not count"
            words += " for new patients (column trained_on)"
            console.print(words, style="yellow")
        console.print(f"scores: {options.output / 'scores.csv'}")
    for _, problem in failed:
        console.print(str(problem), style="yellow")
    lost = len({job.name for job, _ in failed})
    words = f"{images - lost} of {images} images predicted" + (
        f", {lost} failed (above)" if lost else ""
    )
    console.print(words, style="yellow" if lost else "green")
    if lost == images:
        return 1
    return 3 if lost else 0
