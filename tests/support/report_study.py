"""An artificial study folder for tests of the report: its cells, its record, its tables."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.support.report_cells import GAIN, LABEL_COLUMNS, ROUNDS, STRUCTURES, write_cell

SITES = ("BIDMC", "HK", "RUNMC", "UCL")
NESTED = {"cord": ["white_matter", "grey_matter"], "grey_matter": ["grey_matter"]}
FUNDUS = {"cup": ["cup"], "disc": ["rim", "cup"]}
FUNDUS_SITES = ("drishti", "refuge_train", "refuge_val", "rim_one")
ARMS = tuple(GAIN)


def write_study(
    folder: Path,
    *,
    sites=SITES,
    methods=("sgcg", "source"),
    seeds=(0, 1, 2),
    structures=STRUCTURES,
    cases=12,
    pictures=True,
    skip=(),
) -> Path:
    """Write a study in which all cells completed but those in `skip`: (method, heldout, seed)."""
    settings = {method: _settings(method, sites, structures) for method in methods}
    record = {
        "created": "2026-01-05T09:00:00+00:00",
        "updated": "2026-01-05T11:30:00+00:00",
        "command": f"fedsgcg study data=made-up method={','.join(methods)} heldout=all",
        "methods": sorted(methods),
        "heldout": sorted(sites),
        "seeds": sorted(seeds),
        "sites": list(sites),
        "runtime": "inprocess",
        "device": "cpu",
        "machine": "a test, 2 cores, 0 GPUs, Python 3.11, Linux",
        "versions": {"fedsgcg": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0"},
        "settings": settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    for method in methods:
        for heldout in sites:
            for seed in seeds:
                if (method, heldout, seed) not in skip:
                    write_cell(folder, (method, heldout, seed), sites, structures, cases, pictures)
    collect(folder)
    return folder


def collect(folder: Path) -> None:
    for name in ("results.parquet", "rounds.parquet"):
        tables = [pq.read_table(path) for path in sorted(folder.glob(f"*/*/*/{name}"))]
        if tables:
            pq.write_table(pa.concat_tables(tables), folder / name)


def label_of(trains, federation="by_site", setting=""):
    """Return a label: the short name of each swept setting, and the federation unless by_site."""
    parts = [part.partition("=") for part in setting.split()]
    short = [f"{name.rpartition('.')[2]}={value}" for name, _, value in parts]
    return " ".join([trains, *([] if federation == "by_site" else [federation]), *short])


def write_large_study(
    folder: Path,
    *,
    sites=SITES,
    structures=STRUCTURES,
    name="made-up",
    seeds=(0, 1),
    cases=10,
    federations=("by_site", "pooled", "local"),
    arms=ARMS,
    weights=("0.01", "0.05", "0.5", "1"),
    temperatures=("0.1", "2", "100"),
    memories=("cumulative", "restart"),
    columns=True,
    features=True,
    skip=(),
) -> Path:
    """Write a study with four arms, three federations, seeds, two numeric sweeps and one of names.

    `skip` holds labels whose cells are absent; without `columns` the tables are as an older version
    wrote them.
    """
    asked = [(trains, federation, "") for federation in federations for trains in arms]
    settings = [f"prototypes.weight={value}" for value in weights]
    settings += [f"prototypes.temperature={value}" for value in temperatures]
    settings += [f"prototypes.memory={value}" for value in memories]
    asked += [("ram_sgcg", "by_site", setting) for setting in settings]
    labels = {label_of(*entry): entry for entry in asked}
    trees = {label: _settings(entry[0], sites, structures, name) for label, entry in labels.items()}
    record = {
        "created": "2026-01-05T09:00:00+00:00",
        "updated": "2026-01-06T11:30:00+00:00",
        "command": f"fedsgcg study experiment=everything data={name}",
        "methods": sorted(labels),
        "heldout": sorted(sites),
        "seeds": sorted(seeds),
        "sites": list(sites),
        "settings": trees,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    for label, (trains, federation, setting) in labels.items():
        for heldout in sites if label not in skip else ():
            for seed in seeds:
                alone = (
                    [site for site in sites if site != heldout] if federation == "local" else [""]
                )
                for trained_on in alone:
                    facts = dict(
                        zip(LABEL_COLUMNS, (trains, federation, setting, trained_on), strict=True)
                    )
                    plain = not setting and seed == seeds[0]
                    write_cell(
                        folder,
                        (label, heldout, seed),
                        sites,
                        structures,
                        cases,
                        pictures=plain,
                        facts=facts if columns else {"trained_on": trained_on},
                        features=features and plain,
                    )
    collect(folder)
    return folder


def _settings(method, sites, structures, name="made-up"):
    classes = {"background": [0], **{name: [place + 1] for place, name in enumerate(structures)}}
    return {
        "data": {
            "name": name,
            "sites": list(sites),
            "classes": classes,
            "structures": dict(structures),
        },
        "network": {"name": "unet", "base_width": 16, "norm": "batch"},
        "method": {
            "name": method,
            "statistics": "sgcg" in method,
            "learning_rate": 0.001,
            "batch_size": 8,
            "local_epochs": 1,
            "steps_per_round": 0,
        },
        "prototypes": {"weight": 0.1, "temperature": 0.5, "memory": "lagged"},
        "federation": {"rounds": ROUNDS, "weighting": "samples", "selection": "last"},
    }
