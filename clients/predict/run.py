"""`fedsgcg-site predict MODEL IMAGE... -o DIR`: predicts images of this hospital; nothing is sent.

Masks get the geometry of their image and the label values of the training masks. Preprocessing,
decisions and post-processing use the functions of evaluation, so that scores are the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedsgcg.clients.confidence import Gaussians
from fedsgcg.clients.data.slices import read_truth
from fedsgcg.clients.device import choose_device
from fedsgcg.clients.evaluation import BATCH, structure_masks
from fedsgcg.clients.guard.contents import TrainedOn
from fedsgcg.clients.predict.adapt import adapted_model, check_adapt, images_digest
from fedsgcg.clients.predict.files import (
    Job,
    Skipped,
    check_output,
    jobs_of_data,
    jobs_of_images,
    save,
    write,
)
from fedsgcg.clients.predict.model import Model, load_model
from fedsgcg.clients.predict.outputs import check_format, write_maps
from fedsgcg.clients.predict.overlay import overlay
from fedsgcg.clients.predict.predictor import Prediction, Predictor
from fedsgcg.clients.predict.record import Done, Record
from fedsgcg.clients.predict.scores import Scores
from fedsgcg.common.console import Screen, counted
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.images.contents import TRAINING_IMAGES
from fedsgcg.common.names import number_of, printable
from fedsgcg.common.run_folder import paths


def run_predict(options: argparse.Namespace, console: Screen) -> int:
    """Predict every image; return an exit code of `clients.predict.options.EXITS`."""
    if options.batch is None:
        options.batch = BATCH
    _check_options(options)
    model = load_model(options.model, options.code)
    gaussians = _gaussians(options, model)
    check_adapt(options, model)
    jobs = []
    if options.data:
        jobs = jobs_of_data(options.data, model.data, options.site, options.split)
    found, skipped = jobs_of_images(options.images, jobs, list(model.data.structures))
    found = [replace(job, out=options.out_format) for job in found]
    record = Record.open(options.output, model.card, _deciding(options, found))
    check_output(
        options.output,
        found,
        _endings(options),
        overwrite=options.overwrite,
        is_own=record.is_own if options.resume else lambda _: False,
    )
    _print_start(options, model, len(found), skipped, console)
    device = choose_device(options.device, options.threads)
    on_device = gaussians(device) if gaussians else None
    known = _trained_on(options, console)
    with adapted_model(options, model, found, device, console) as ready:
        predictor = Predictor(ready, device, options.batch, options.probability, on_device)
        return _predict_all(predictor, found, options, known, record, console)


def _predict_all(
    predictor: Predictor,
    found: Sequence[Job],
    options: argparse.Namespace,
    known: TrainedOn | None,
    record: Record,
    console: Screen,
) -> int:
    """Predict every image; return the exit code."""
    scores = Scores(predictor.model.data)
    failed: list[tuple[Job, Problem]] = []
    earlier = 0
    items = counted(found, console, "predicting") if console.redraws else iter(found)
    for number, job in enumerate(items, 1):
        place = f"[{number}/{len(found)}] {job.shown}"
        try:
            done = record.finished(job) if options.resume else None
            if done is not None:
                earlier += 1
                line = scores.again(done.scores, done.trained_on)
            else:
                line = _predict_one(predictor, job, options, scores, known, record)
        except FedsgcgError as error:
            failed += [(job, problem) for problem in error.problems]
            line = f"[{error.code}] not predicted"
        except Exception as error:  # a bad image must not stop the others
            text = f"{type(error).__name__}: {error}"
            action = "Check the file; the other images are predicted."
            failed.append((job, Problem("MOD-810", text, action=action, where=str(job.image))))
            line = "[MOD-810] not predicted"
        style = "yellow" if failed and failed[-1][0] is job else None
        console.print(f"{place}  {line}", style=style)
    return _finish(options, scores, failed, len(found), earlier, console)


def _check_options(options: argparse.Namespace) -> None:
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
    """Return a function that puts the prototypes on a device; None if not requested.

    Raises:
        FedsgcgError: MOD-807 when they are requested and missing.
    """
    if not options.confidence:
        return None
    prototypes = model.prototypes
    if prototypes is None:
        found = "a method without statistics"
        if model.card.get("prototypes"):
            found = "no prototypes.arrow"
        action = "Omit --confidence, or train with method.statistics=true."
        raise fail(
            "MOD-807",
            where=str(options.model),
            found=found,
            expected=paths.PROTOTYPES,
            action=action,
        )
    return lambda device: Gaussians.of(prototypes, device)


def _deciding(options: argparse.Namespace, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what decides the content of the results besides the model."""
    names = ("probability", "confidence", "overlay", "out_format", "series")
    deciding = {name: getattr(options, name) for name in names}
    if options.adapt:
        adapt = [options.adapt, options.adapt_share, images_digest(jobs)]
        deciding["adapt"] = adapt
    return deciding


def _endings(options: argparse.Namespace) -> tuple[str, ...]:
    requested = (
        ("_probability", options.probability),
        ("_confidence", options.confidence),
        ("_overlay", options.overlay),
    )
    return ("_mask", *(ending for ending, on in requested if on))


def _print_start(
    options: argparse.Namespace, model: Model, images: int, skipped: Skipped, console: Screen
) -> None:
    card = model.card
    trained = ", ".join(card.get("protocol", {}).get("trained", [])) or "unknown hospitals"
    name = f"model {str(card['digest'])[:12]}: {card.get('method', '?')} on {card['data']}"
    console.print(f"{name}, trained at {trained}; {number_of(images, 'image')} to {options.output}")
    for text in skipped.texts():
        console.print(f"skipped: {text}", style="dim")


def _trained_on(options: argparse.Namespace, console: Screen) -> TrainedOn | None:
    """Return the images that the model was trained on; print a note if they are not known."""
    known = TrainedOn.of_model(options.model)
    if known is None and options.data:
        note = f"no {TRAINING_IMAGES} in the model's folder: its training cases are not marked"
        console.print(note, style="dim")
    return known


def _predict_one(
    predictor: Predictor,
    job: Job,
    options: argparse.Namespace,
    scores: Scores,
    known: TrainedOn | None,
    record: Record,
) -> str:
    """Predict one image, write the requested files, and return a line for the console."""
    started = time.monotonic()
    data = predictor.model.data
    check_format(job.image, job.out)
    try:
        prediction = predictor.predict(job.image, options.series)
    except (RuntimeError, MemoryError, ValueError) as error:
        # Out of memory, or an image size that the network does not support.
        action = "Try a smaller --batch, or --device cpu."
        raise fail(
            "MOD-810", where=str(job.image), found=f"{type(error).__name__}: {error}", action=action
        ) from error
    truth = _truth(job, prediction, predictor.model)
    record.start(job)
    card = predictor.model.card
    written = write_maps(
        partial(job.result, options.output),
        save,
        prediction,
        list(data.structures),
        list(data.classes),
        f"{card['data']} {str(card['digest'])[:12]}",
    )
    hospital = known.hospital_of(prediction.volume) if known else ""
    parts = [_sizes(prediction, predictor.model)]
    dice = ""
    if truth is not None:
        dice = scores.add(job, prediction, truth, hospital)
        parts.append(dice)
    if prediction.confidence is not None and prediction.masks.any():
        inside = prediction.confidence[prediction.masks.any(0)]
        parts.append(f"confidence {float(inside.mean()):.2f}")
    if options.overlay:
        true_masks = None if truth is None else structure_masks(truth, data)
        title = f"{job.site} {printable(Path(job.name).name)}  {dice}".strip()
        picture = overlay(prediction, list(data.structures), title, true_masks)
        target = job.result(options.output, "_overlay")
        write(target, picture)
        written.append(target)
    if hospital:
        parts.append(f"TRAINED ON (at {hospital})")
    if prediction.note:
        parts.append(prediction.note)
    record.finish(job, written, Done({}, scores.of_case(job), hospital))
    return "  ".join([*parts, f"{time.monotonic() - started:.1f} s"])


def _truth(job: Job, prediction: Prediction, model: Model) -> Any:
    """Return the true class indices (Z, Y, X), None for an image without a mask."""
    if job.mask is None:
        return None
    names = tuple(name for name, _ in job.structures)
    try:
        return read_truth(job.masks, names, prediction.volume, model.data, str(job.mask))
    except FedsgcgError as error:
        if error.code not in ("DAT-109", "DAT-165"):
            raise
        (problem,) = error.problems
        action = "Score it with a model for these labels, or omit --data."
        where = str(job.mask)
        raise fail(
            "MOD-805", where=where, found=problem.found, expected=problem.expected, action=action
        ) from error


def _sizes(prediction: Prediction, model: Model) -> str:
    """Describe the size of each structure."""
    volume = prediction.volume
    voxel = float(np.prod(volume.spacing)) / 1000
    in_millimetres = model.data.spacing_unit == "mm" and volume.millimetres is not None
    unit = "pixels" if volume.is_picture else "voxels"
    parts = []
    for name, mask in zip(model.data.structures, prediction.masks, strict=True):
        pixels = int(mask.sum())
        if not pixels:
            parts.append(f"{name} not found")
        elif in_millimetres:
            parts.append(f"{name} {pixels * voxel:.1f} ml")
        else:
            parts.append(f"{name} {pixels} {unit}")
    return ", ".join(parts)


def _finish(
    options: argparse.Namespace,
    scores: Scores,
    failed: Sequence[tuple[Job, Problem]],
    images: int,
    earlier: int,
    console: Screen,
) -> int:
    """Print the scores and the failures; return the exit code."""
    if scores.rows:
        scores.write(options.output / "scores.csv")
        console.print(scores.table())
        if trained := scores.trained_on():
            names = ", ".join([*trained[:5], *(["..."] if len(trained) > 5 else [])])
            warning = (
                f"{len(trained)} of {scores.cases()} scored cases are images that the model was "
                f"trained on or selected by ({names}): their scores say nothing about new patients "
                "(column trained_on)"
            )
            console.print(warning, style="yellow")
        console.print(f"scores: {options.output / 'scores.csv'}")
    for _, problem in failed:
        console.print(str(problem), style="yellow")
    lost = len({job.name for job, _ in failed})
    summary = f"{images - lost} of {number_of(images, 'image')} predicted"
    if earlier:
        summary += f", {earlier} of them earlier and unchanged"
    if lost:
        summary += f", {lost} failed (above)"
    console.print(summary, style="yellow" if lost else "green")
    if lost == images:
        return 1
    return 3 if lost else 0
