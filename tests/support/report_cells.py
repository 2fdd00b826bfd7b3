"""Cells of an artificial study: all files of one run, fixed random numbers, discs."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedsgcg.clients.guard import ledger
from fedsgcg.common.feature_samples import write_feature_samples
from fedsgcg.common.files import chain
from fedsgcg.common.pictures import Picture, bit_mask, write_pictures
from fedsgcg.common.run_folder.tables import RESULTS_SCHEMA, ROUNDS_SCHEMA
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Identity, encode_statistics

STRUCTURES = {"prostate": ["prostate"]}
ROUNDS = 20
LABEL_COLUMNS = ("trains", "federation", "setting", "trained_on")
GAIN = {"source": 0.0, "ram": 0.012, "sgcg": 0.025, "ram_sgcg": 0.04}
COST = {"by_site": 0.0, "pooled": 0.004, "local": -0.09}


def write_cell(
    folder,
    key,
    sites,
    structures,
    cases=12,
    pictures=True,
    status="completed",
    problems=(),
    facts=None,
    features=False,
):
    method, heldout, seed = key
    facts = facts or {}
    trained_on = facts.get("trained_on", "")
    fold = f"{seed}-{trained_on}" if trained_on else str(seed)
    cell = folder / method.replace(" ", ",") / heldout / fold
    cell.mkdir(parents=True, exist_ok=True)
    training = [trained_on] if trained_on else [site for site in sites if site != heldout]
    names = dict(zip(("method", "heldout", "seed"), key, strict=True))
    added = facts if "trains" in facts else {}
    results = [row | added for row in result_rows(key, structures, cases, facts)]
    pq.write_table(
        pa.Table.from_pylist(results, schema=_with_labels(RESULTS_SCHEMA, added)),
        cell / "results.parquet",
    )
    rounds = [row | added for row in round_rows(key, training, facts)]
    pq.write_table(
        pa.Table.from_pylist(rounds, schema=_with_labels(ROUNDS_SCHEMA, added)),
        cell / "rounds.parquet",
    )
    outcome = names | {
        "status": status,
        "error": "",
        "digest": f"{seed}ab4" * 16,
        "seconds": 412.5,
        "problems": list(problems),
    }
    (cell / "outcome.json").write_text(json.dumps(outcome))
    (cell / "model.json").write_text(
        json.dumps(names | {"digest": outcome["digest"], "protocol": _protocol(heldout, training)})
    )
    (cell / "events.jsonl").write_text(
        json.dumps(names | {"time": 1.0, "event": "run.started"})
        + "\n"
        + json.dumps(names | {"time": 413.5, "event": "run.finished", "status": status})
        + "\n"
    )
    trains = facts.get("trains") or method.split()[0]
    write_ledgers(cell, trains, training, heldout)
    if pictures:
        write_discs(cell / "sites" / heldout / "pictures.arrow", key, structures, cases, facts)
    if features:
        write_features(cell, trains, training, heldout, len(structures) + 1)


def _with_labels(schema, added):
    """A table's schema with the columns of labels, or without them as an older version wrote it."""
    kept = [field for field in schema if field.name not in LABEL_COLUMNS]
    return pa.schema([*kept, *(pa.field(name, pa.string()) for name in LABEL_COLUMNS if added)])


def write_features(cell, trains, training, heldout, classes, channels=8, pixels=120):
    """Feature samples of every site, and prototypes if any; SgCG's classes are further apart."""
    apart, shift = (3.0, 0.3) if "sgcg" in trains else (1.4, 1.0)
    labels = np.repeat(np.arange(classes), pixels)
    parts = []
    for site in (*training, heldout):
        rng = np.random.default_rng(hash_of(site))
        place = rng.normal(0, 1, channels)
        centres = apart * np.eye(classes, channels) + shift * place
        features = np.maximum(centres[labels] + rng.normal(0, 0.5, (labels.size, channels)), 0)
        features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-12
        write_feature_samples(
            cell / "sites" / site / "features.arrow", features, labels, site, trains
        )
        parts.append(ClassStatistics.from_features(features, labels, classes))
    if "sgcg" in trains:
        pooled = sum(parts[1:-1], parts[0])
        identity = Identity("run", heldout, ROUNDS, "0" * 8)
        (cell / "prototypes.arrow").write_bytes(encode_statistics(pooled, identity))


def gain_of(key, facts):
    """What a label adds to the Dice of a case, in a study made up to have known answers."""
    facts = facts or {}
    trains = facts.get("trains") or key[0].split()[0]
    gain = GAIN.get(trains, 0.0) + COST.get(facts.get("federation", "by_site"), 0.0)
    for part in facts.get("setting", "").split():
        name, _, value = part.partition("=")
        if name == "prototypes.weight":
            gain -= 0.015 * np.log10(float(value) / 0.1) ** 2
        elif name == "prototypes.temperature":
            gain -= 0.01 * np.log10(float(value) / 0.5) ** 2
        else:
            gain -= 0.01 * (value == "cumulative")
    return gain


def result_rows(key, structures, cases, facts=None):
    method, heldout, seed = key
    alone = (facts or {}).get("trained_on", "")
    rng = np.random.default_rng([hash_of(heldout), 1])
    level = 0.74 + 0.12 * rng.random()
    hard = rng.normal(0, 0.05, cases)
    noise = np.random.default_rng([hash_of(method + heldout + alone), seed])
    gain = gain_of(key, facts)
    rows = []
    for case in range(cases):
        for depth, structure in enumerate(structures):
            dice = float(
                np.clip(level + hard[case] - 0.08 * depth + gain + noise.normal(0, 0.012), 0, 1)
            )
            empty = case == 0 and method == "source" and heldout == "HK"
            dice = 0.0 if empty else dice
            distance = float("nan") if empty else 9.0 * (1.02 - dice)
            rows.append(
                {
                    "method": method,
                    "heldout": heldout,
                    "seed": seed,
                    "site": heldout,
                    "case": f"{hash_of(heldout + str(case)):08x}",
                    "structure": structure,
                    "dice": dice,
                    "asd": distance,
                    "assd": distance * 1.1,
                    "hd95": distance * 3.4,
                    "unit": "pixel",
                    "asd_mm": None,
                    "assd_mm": None,
                    "hd95_max": distance * 3.7,
                    "hd95_mm": None,
                    "hd95_max_mm": None,
                    "empty_prediction": empty,
                    "empty_truth": False,
                }
            )
    return rows


def round_rows(key, training, facts=None):
    method, heldout, seed = key
    has_sgcg = "sgcg" in method
    rng = np.random.default_rng([hash_of(method + heldout), seed, 7])
    rows = []

    def add(number, phase, site, metric, value, cls=""):
        rows.append(
            {"method": method, "heldout": heldout, "seed": seed, "round": number, "phase": phase}
            | {"site": site, "cls": cls, "metric": metric, "value": float(value)}
        )

    for number in range(1, ROUNDS + 1):
        for site in training:
            supervised = 0.9 * np.exp(-number / 5) + 0.08 + rng.normal(0, 0.012)
            contrast = 0.5 * np.exp(-number / 9) + 0.2 if has_sgcg else 0.0
            add(number, "train", site, "loss_supervised", supervised)
            add(number, "train", site, "loss", supervised + 0.1 * contrast)
            add(
                number,
                "train",
                site,
                "validation_dice",
                0.88 * (1 - np.exp(-(number - 1) / 3)) + rng.normal(0, 0.012),
            )
            add(number, "train", site, "bytes_up", 12_800_000)
            add(
                number,
                "train",
                site,
                "steps",
                84 if (facts or {}).get("federation") == "pooled" else 28,
            )
        if facts:
            add(
                number,
                "heldout",
                heldout,
                "heldout_dice",
                0.8 * (1 - np.exp(-number / 4)) + gain_of(key, facts),
            )
            add(
                number,
                "heldout",
                heldout,
                "heldout_asd",
                6 * np.exp(-number / 6) + 1.2 - gain_of(key, facts),
            )
        if has_sgcg and len(training) > 1:
            for cls, scale in (("background", 0.02), ("prostate", 0.06)):
                add(
                    number,
                    "merge",
                    "",
                    "between_site_trace",
                    scale * np.exp(-number / 8) * (1 + rng.normal(0, 0.08)),
                    cls,
                )
                add(
                    number,
                    "merge",
                    "",
                    "within_site_trace",
                    0.3 + scale * np.exp(-number / 15),
                    cls,
                )
    return rows


def write_ledgers(cell, method, training, heldout):
    parts = {"weights": 12_740_000, "text": 1_900, "metrics": 80}
    parts |= {"statistics": 8_600} if "sgcg" in method else {}
    for site in training:
        lines = []
        path = cell / "sites" / site / "ledger.jsonl"
        for number in range(1, ROUNDS + 1):
            entry = {
                "seq": number - 1,
                "round": number,
                "kind": "train",
                "parts": parts,
                "withheld": [],
            }
            entry["previous"] = json.loads(lines[-1])["hash"] if lines else chain.START
            lines.append(json.dumps(entry | {"hash": chain.seal(entry)}))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    ledger.append(
        cell / "sites" / heldout / "ledger.jsonl",
        round_number=ROUNDS,
        kind="evaluate",
        parts={"cases": 3_300, "text": 400},
        withheld=[],
        sha256="0" * 64,
    )


def write_discs(path, key, structures, cases, facts=None, size=128):
    """A grey slice with a bright disc per case; the prediction is a shifted, smaller disc."""
    method, heldout, seed = key
    rows, columns = np.mgrid[:size, :size]
    found = []
    dice = {}
    for row in result_rows(key, structures, cases, facts):
        dice.setdefault(row["case"], []).append(row["dice"])
    for case, values in dice.items():
        rng = np.random.default_rng(hash_of(case))
        y, x, radius = rng.uniform(50, 78), rng.uniform(50, 78), rng.uniform(16, 27)
        ripple = 1 + 0.12 * np.sin(3 * np.arctan2(rows - y, columns - x) + rng.uniform(0, 6))
        distance = np.hypot(rows - y, (columns - x) / 1.25) / ripple
        moved = (
            np.hypot(rows - y - (3 if "sgcg" in method else 6), (columns - x + 2) / 1.2) / ripple
        )
        truth = np.stack([distance < radius / (depth + 1) for depth in range(len(structures))])
        guess = np.stack(
            [
                moved < (0 if values[0] == 0 else radius * 0.95) / (depth + 1)
                for depth in range(len(structures))
            ]
        )
        image = (
            70
            + 60 * (distance < radius)
            + 30 * np.exp(-((rows - 64) ** 2 + (columns - 64) ** 2) / 3000)
        )
        image = np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)
        found.append(
            Picture(
                case,
                float(np.mean(values)),
                11,
                image.tobytes(),
                truth[0].astype(np.uint8).tobytes(),
                bit_mask(guess).tobytes(),
                bit_mask(truth).tobytes(),
                size,
                size,
            )
        )
    write_pictures(path, found, list(structures))


def hash_of(text: str) -> int:
    """A number that is the same in every process."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _protocol(heldout, training):
    return {
        "trained": training,
        "heldout": heldout,
        "observers": [],
        "splits": "by patient; 20% of a training site's patients are source validation; every case "
        "of the held-out site is its test set unless the manifest says otherwise",
        "selection": "the model of the last round",
        "selected_round": ROUNDS,
        "rounds": ROUNDS,
        "evaluated": "every slice of every test case, normalisation in evaluation mode, "
        "at the images' own size",
        "decision": "probabilities at training size, bilinear to the images' own size, "
        "then the likeliest class",
        "post_processing": dict.fromkeys(STRUCTURES, "largest connected component; holes filled"),
        "metrics": {
            "dice": "2 |P∩T| / (|P| + |T|); 1 when both are empty",
            "asd": "mean distance from the predicted surface to the true one",
            "assd": "mean distance over the pooled surface points of both",
            "hd95": "95th percentile of the pooled distances of both surfaces (as medpy)",
            "hd95_max": "larger of the two directed 95th percentiles (as MONAI)",
            "empty": "with one of the two masks empty the distances are undefined, "
            "left out of means and counted",
        },
        "distance_unit": "pixel",
    }
