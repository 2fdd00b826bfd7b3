"""What is fuzzed: every decoder with honest examples and the mutations that fit them."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

from fedsgcg.clients.data.manifest import read_manifest
from fedsgcg.clients.guard.site_file import SiteFile, read_site_file, site_file_text
from fedsgcg.clients.predict.model import load_model
from fedsgcg.common.errors import fail
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire import payload
from fedsgcg.common.wire.amplitudes import AmplitudeBank, AmplitudeSummary
from fedsgcg.common.wire.messages import (
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.deploy.coordinator.project import read_project
from fedsgcg.server.records.checkpoint import Best, RoundRecord
from fedsgcg.server.records.journal import Journal
from tests.faults.fuzz import mutations
from tests.faults.fuzz.exports import export_targets
from tests.faults.fuzz.formats import format_targets
from tests.faults.fuzz.mutations import Mutation
from tests.faults.fuzz.target import Target, file_target
from tests.support.predictions import store

IDENTITY = Identity("run", "D", 1, "plan")


def statistics() -> ClassStatistics:
    """Class statistics of 20 features."""
    rng = np.random.default_rng(0)
    return ClassStatistics.from_features(rng.normal(size=(20, 3)), np.repeat([0, 1], 10), 2)


def moments() -> NormMoments:
    """Moments of two layers."""
    return NormMoments({"a": 2, "b": 1}, np.full(2, 9.0), np.zeros(3), np.ones(3))


def summary() -> AmplitudeSummary:
    """Amplitude summary of four images."""
    amplitudes = np.random.default_rng(0).uniform(1, 9, (4, 1, 2, 2, 2)).astype(np.float32)
    return AmplitudeSummary.from_amplitudes(amplitudes, 16, sites=("A",))


def weights() -> Weights:
    """Weights of a small layer."""
    values = np.random.default_rng(0).normal(size=7).astype(np.float32)
    return Weights((("w", (3, 2)), ("b", (1,))), values, (("n", 3),))


def cases() -> bytes:
    """Per-case results of one case."""
    row: dict[str, Any] = dict.fromkeys(payload.DISTANCES, float("nan"))
    row |= {"case": "a1", "structure": "gland", "dice": 0.5, "unit": "pixel"}
    return payload.encode_cases([row | {"empty_prediction": True, "empty_truth": False}])


def reply() -> Reply:
    """A reply with every part."""
    bank = AmplitudeBank(np.ones((2, 1, 2, 2, 2), np.float32), ("A", "A"))
    metrics = {"examples": 3.0, "loss": 0.1}
    first = Reply(IDENTITY, "A", weights(), statistics(), metrics, cases(), {"withheld": ["x"]})
    return replace(first, amplitudes=bank.encode(), moments=moments())


def record(number: int) -> RoundRecord:
    """State after a round, with every part."""
    best = Best(number - 1, 0.5, weights()) if number > 1 else None
    rows = [
        {"round": number, "phase": "train", "site": "A", "cls": "", "metric": "loss", "value": 0.5}
    ]
    return RoundRecord(
        replace(IDENTITY, round=number),
        weights(),
        {"A": statistics()},
        best,
        aggregator_state={"momentum": np.ones(2)},
        rows=tuple(rows),
    )


def message(data: bytes) -> object:
    """Decode protobuf bytes as a reply and as a request; Flower refuses what is no protobuf."""
    try:
        records = recorddict_from_proto(ProtoRecordDict.FromString(data))
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise fail("PAY-106") from error
    return decode_reply(records) if b"details" in data else decode_request(records)


def message_of(data: bytes, source: random.Random) -> bytes:
    """Change the texts, bytes, array or records of a message, or its protobuf."""
    if source.random() < 0.2:
        return mutations.bytes_of(data, source)
    records = recorddict_from_proto(ProtoRecordDict.FromString(data))
    content = records["message"]
    name = source.choice([*content, "values", "record"])
    if name == "record":
        del records[source.choice(list(records))]
    elif name == "values" and "weights" in records:
        array = records["weights"]["values"]
        head = source.random() < 0.6
        changed = mutations.bytes_of(array.data[:128], source) + array.data[128:]
        raw = changed if head else mutations.bytes_of(array.data, source)
        records["weights"] = ArrayRecord(
            {"values": Array(array.dtype, array.shape, array.stype, raw)}
        )
    elif name in content:
        value = content[name]
        if isinstance(value, bytes):
            mutate = mutations.arrow_of if value else mutations.bytes_of
            content[name] = mutate(value, source)
        elif name in ("site", "error"):
            content[name] = source.choice(("", "x" * 70000, "\x1b[31m", "a\nb", 3, b"site", [1]))
        else:
            content[name] = mutations.json_of(value.encode(), source).decode("utf-8", "replace")
    return bytes(recorddict_to_proto(records).SerializeToString())


def journal_targets(folder: Path) -> list[Target]:
    """The files of a journal of two rounds; one of them is changed, then the run is resumed."""
    settings = {"seed": 0, "method": {"name": "sgcg"}}
    with Journal(folder, "plan", settings) as journal:
        journal.resume()
        for number in (1, 2):
            journal.commit_round(record(number))
    content = {
        path: path.read_bytes() for path in (folder / "journal").rglob("*") if path.is_file()
    }

    def target(relative: str, mutate: Mutation) -> Target:
        changed = folder / "journal" / relative

        def decode(data: bytes) -> object:
            for path, honest in content.items():
                path.write_bytes(honest)
            changed.write_bytes(data)
            with Journal(folder, "plan", settings) as journal:
                return journal.resume(), journal.rows()

        return Target(f"journal-{changed.stem}", (content[changed],), decode, mutate, 4.0)

    return [
        target("plan.json", mutations.json_of),
        target("rounds/00002.arrow", mutations.arrow_of),
        target("checkpoint-00002.safetensors", mutations.safetensors_of),
    ]


def model_targets(folder: Path) -> list[Target]:
    """The files of a model folder; one of them is changed, then the model is loaded."""
    store(folder)
    names = ("model.json", "model.safetensors", "prototypes.arrow")
    content = {name: (folder / name).read_bytes() for name in names}

    def target(name: str, mutate: Mutation) -> Target:
        def decode(data: bytes) -> object:
            for other, honest in content.items():
                (folder / other).write_bytes(honest)
            (folder / name).write_bytes(data)
            return load_model(folder)

        return Target(name.replace(".", "-"), (content[name],), decode, mutate, 20.0)

    return [
        target("model.json", mutations.json_of),
        target("model.safetensors", mutations.safetensors_of),
        target("prototypes.arrow", mutations.arrow_of),
    ]


def targets(folder: Path) -> list[Target]:
    """Every target; files are written below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    site = site_file_text(
        SiteFile(
            "A", "p", "127.0.0.1:9092", "ca.crt", "site.key", "data", "home", "cache", "a.json"
        )
    )
    project = (
        "name: p\nserver: 127.0.0.1:9092\nsites: [A, B]\nplan: [method=sgcg, seed=3]\nquorum: 1\n"
    )
    manifest = "site,image,mask,patient_id,split\nA,a.nii.gz,b.nii.gz,p1,train\nA,c.nii,d.nii,p2,\n"
    facts = json.dumps({"layout": [["w", [3, 2]], ["b", [1]]], "counters": {"n": 3}})
    identity = json.dumps(asdict(IDENTITY))
    some = np.zeros(7, np.float32)
    arrow = mutations.arrow_of
    request = Request(IDENTITY, weights(), statistics(), {"split": "test"}, summary().encode())
    sent = tuple(
        bytes(recorddict_to_proto(records).SerializeToString())
        for records in (encode_reply(reply()), encode_request(request))
    )
    bank = AmplitudeBank(np.ones((2, 1, 2, 2, 2), np.float32), ("A", "A")).encode()
    return [
        Target(
            "statistics",
            (payload.encode_statistics(statistics(), IDENTITY),),
            payload.decode_statistics,
            arrow,
        ),
        Target("cases", (cases(),), payload.decode_cases, arrow),
        Target("moments", (moments().encode(IDENTITY),), NormMoments.decode, arrow),
        Target("amplitude-summary", (summary().encode(),), AmplitudeSummary.decode, arrow),
        Target("amplitude-bank", (bank,), AmplitudeBank.decode, arrow),
        Target(
            "identity",
            (identity.encode(),),
            lambda data: Identity.decode(data.decode("utf-8", "replace")),
            mutations.json_of,
        ),
        Target(
            "layout",
            (facts.encode(),),
            lambda data: Weights.decode(data.decode("utf-8", "replace"), some),
            mutations.json_of,
        ),
        Target("message", sent, message, message_of, 2),
        file_target(
            folder, "site", ".yaml", (site.encode(),), read_site_file, mutations.yaml_of, 10
        ),
        file_target(
            folder, "project", ".yaml", (project.encode(),), read_project, mutations.yaml_of, 100
        ),
        file_target(
            folder, "manifest", ".csv", (manifest.encode(),), read_manifest, mutations.csv_of
        ),
        *journal_targets(folder / "run"),
        *model_targets(folder / "model"),
        *format_targets(folder / "images"),
        *export_targets(folder),
    ]
