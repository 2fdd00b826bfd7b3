"""Edges of the payload decoders: no class, empty tensors, negative sizes."""

import json

import numpy as np
import pyarrow as pa
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Identity, Weights, decode_statistics, encode_statistics


def layout(*entries: tuple[str, list[int]]) -> str:
    return json.dumps({"layout": [list(entry) for entry in entries], "counters": {}})


def test_statistics_without_a_class_are_refused() -> None:
    one = ClassStatistics.from_features(np.ones((4, 2)), np.zeros(4, int), 1)
    data = encode_statistics(one, Identity("run", "D", 1, "plan"))
    with pa.ipc.open_stream(data) as reader:
        table = reader.read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, 0))
    with pytest.raises(FedsgcgError, match="PAY-106"):
        decode_statistics(bytes(sink.getvalue()))


def test_an_empty_tensor_and_a_number_are_tensors() -> None:
    found = Weights.decode(layout(("a", [0, 3]), ("b", [])), np.ones(1, np.float32))
    shapes = {name: array.shape for name, array in found.to_state().items()}
    assert shapes == {"a": (0, 3), "b": ()}


def test_negative_sizes_are_refused_although_their_product_fits() -> None:
    with pytest.raises(FedsgcgError, match="PAY-103"):
        Weights.decode(layout(("a", [-1, -1])), np.ones(1, np.float32))
