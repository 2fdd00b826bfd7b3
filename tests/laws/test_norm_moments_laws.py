"""Moments of BatchNorm's inputs: pooling equals computing at once."""

from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsgcg.clients.data.augment import augment
from fedsgcg.clients.data.batches import gather, index_batches
from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.methods.class_statistics import site_moments
from fedsgcg.clients.training import load_weights, weights_of
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import AugmentationSettings
from fedsgcg.common.wire.messages import Reply
from fedsgcg.common.wire.norm_moments import NormMoments, norm_layers
from fedsgcg.common.wire.payload import Identity
from fedsgcg.server.admission import Expectation, admit
from fedsgcg.server.aggregation.fedavg import merge_moments
from tests.support import sites

CPU = torch.device("cpu")
LAYERS = {"a": 2, "b.norm": 3}
IDENTITY = Identity("run", "South", 2, "plan")


def moments_of(*inputs: np.ndarray) -> NormMoments:
    """Brute force: (n, C) inputs of each layer."""
    return NormMoments(
        LAYERS,
        np.array([len(rows) for rows in inputs], dtype=float),
        np.concatenate([rows.mean(0) for rows in inputs]),
        np.concatenate([((rows - rows.mean(0)) ** 2).sum(0) for rows in inputs]),
    )


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.floats(-1e3, 1e3),
)
def test_pooled_moments_are_those_of_all_inputs_at_once(seed, sizes, offset):
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(offset, 2, (n, 2)), rng.normal(size=(2 * n, 3))) for n in sizes]
    pooled = reduce(add, [moments_of(*part) for part in parts], NormMoments.empty(LAYERS))
    expected = moments_of(*(np.concatenate([part[k] for part in parts]) for k in range(2)))
    np.testing.assert_array_equal(pooled.count, expected.count)
    np.testing.assert_allclose(pooled.mean, expected.mean, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(pooled.scatter, expected.scatter, rtol=1e-8, atol=1e-9)


def test_moments_by_hand():
    one = NormMoments({"a": 1}, [2.0], [1.0], [2.0])  # 0, 2
    other = NormMoments({"a": 1}, [1.0], [4.0], [0.0])  # 4
    both = one + other
    assert (both.count[0], both.mean[0], both.scatter[0]) == (3, 2, 8)
    assert both.variance[0] == 4
    equal = merge_moments([("A", one), ("B", other)], "sites")
    assert (equal.count[0], equal.mean[0]) == (3, 2.5)
    with pytest.raises(ValueError, match="weighting"):
        merge_moments([("A", one)], "pixels")
    with pytest.raises(ValueError, match="layers"):
        one + NormMoments({"b": 1}, [2.0], [1.0], [2.0])


@given(st.integers(0, 2**32 - 1))
def test_what_travels_comes_back_to_the_bit(seed):
    rng = np.random.default_rng(seed)
    sent = moments_of(rng.normal(size=(7, 2)), rng.normal(size=(9, 3)))
    found, identity = NormMoments.decode(sent.encode(IDENTITY))
    assert identity == IDENTITY
    assert dict(found.layers) == LAYERS
    for name in ("count", "mean", "scatter"):
        np.testing.assert_array_equal(getattr(found, name), getattr(sent, name))


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", moments_of(np.ones((2, 2)), np.ones((2, 3))).encode(IDENTITY)[:200]]
)
def test_bytes_that_are_no_moments_are_refused(data):
    with pytest.raises(FedsgcgError, match="PAY-106"):
        NormMoments.decode(data)


@pytest.mark.parametrize(
    ("change", "code"), [("kind", "PAY-106"), ("column", "PAY-106"), ("schema_version", "PAY-107")]
)
def test_a_table_of_another_kind_or_version_is_refused(change: str, code: str) -> None:
    sent = moments_of(np.ones((3, 2)), np.ones((3, 3))).encode(IDENTITY)
    with pa.ipc.open_stream(pa.BufferReader(sent)) as reader:
        table = reader.read_all()
    if change == "column":
        table = table.append_column("more", pa.array([0] * len(table)))
    else:
        changed = {**table.schema.metadata, change.encode(): b"other"}
        table = table.replace_schema_metadata(changed)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(FedsgcgError, match=code):
        NormMoments.decode(sink.getvalue().to_pybytes())


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("moments")
    root = sites.hospitals(folder / "data")
    still = ["augmentation=none"]
    # Each site in one batch, which is compared with the plain slices.
    plan = sites.plan_of(root, folder, "method.batch_size=64", "data.sites=[North,South]", *still)
    tables = [
        open_store(open_site(root, name, plan.data), plan.data, folder / "c", heldout=False).slices(
            "train"
        )
        for name in sites.SITES
    ]
    return plan, tables, build_network(plan.network, 3, plan.data.out_channels, 0)


def inputs_of(network: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Inputs (n, C) of every BatchNorm layer, each batch normalised by its own moments."""
    found, handles = {}, []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):

            def keep(_: nn.Module, given: tuple[torch.Tensor], name: str = name) -> None:
                found[name] = given[0].permute(0, 2, 3, 1).flatten(0, 2)

            handles.append(layer.register_forward_pre_hook(keep))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        network.train()(images)
    network.load_state_dict(before)
    for handle in handles:
        handle.remove()
    return {name: rows.double().numpy() for name, rows in found.items()}


def rngs(number: int) -> list[np.random.Generator]:
    return [np.random.default_rng(k) for k in range(number)]


def test_the_merged_model_has_the_moments_of_all_sites_inputs(opened):
    plan, tables, network = opened
    before = weights_of(network)
    parts = [
        (name, site_moments(network, [table], plan, CPU, rngs(1), torch.Generator()))
        for name, table in zip(sites.SITES, tables, strict=True)
    ]
    assert weights_of(network).digest() == before.digest()
    apart = [
        inputs_of(network, torch.from_numpy(table.stack(range(len(table)))[0])) for table in tables
    ]
    merged = merge_moments(parts).put_into(before)
    state = merged.to_state()
    assert list(apart[0]) == list(norm_layers(before))
    for layer in apart[0]:
        rows = np.concatenate([part[layer] for part in apart])
        # In units of the deviation; the network runs in float32 and in another order of the slices.
        off = (state[f"{layer}.running_mean"] - rows.mean(0)) / rows.std(0)
        assert np.abs(off).max() < 1e-4, layer
        np.testing.assert_allclose(
            state[f"{layer}.running_var"], rows.var(0, ddof=1), rtol=1e-3, err_msg=layer
        )
    changed = [
        name for name, array in before.to_state().items() if not np.array_equal(array, state[name])
    ]
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)
    assert merged.counters == before.counters
    load_weights(network, merged)  # it is a model of the same layout
    load_weights(network, before)


def test_batches_add_up_to_one_pass_over_every_slice(opened):
    plan, tables, network = opened
    found = site_moments(network, tables[:1], plan, CPU, rngs(1), torch.Generator())
    images, _ = tables[0].stack(range(len(tables[0])))
    first = inputs_of(network, torch.from_numpy(images))
    assert found.count.tolist() == [len(rows) for rows in first.values()]


def test_the_moments_are_those_of_the_augmented_batches_of_a_step(opened):
    plan, tables, network = opened
    noisy = replace(
        plan,
        data=replace(
            plan.data, augmentation=AugmentationSettings(gamma=0.5, brightness=0.5, noise=0.5)
        ),
    )
    found = site_moments(network, tables[:1], noisy, CPU, rngs(1), torch.Generator().manual_seed(3))
    again = site_moments(network, tables[:1], noisy, CPU, rngs(1), torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(found.mean, again.mean)
    (chosen,) = index_batches(tables[:1], noisy.method, rngs(1))
    images, labels = gather(tables[:1], chosen)
    changed, _ = augment(images, labels, noisy.data.augmentation, torch.Generator().manual_seed(3))
    first = next(iter(inputs_of(network, changed).values()))
    np.testing.assert_allclose(found.mean[: first.shape[1]], first.mean(0), atol=1e-4 * first.std())
    plain = site_moments(network, tables[:1], plan, CPU, rngs(1), torch.Generator())
    assert np.abs(found.mean - plain.mean).max() > 0.01


def reply(moments: NormMoments | None) -> Reply:
    return Reply(IDENTITY, "North", moments=moments)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda m: None, "no moments"),
        (lambda m: NormMoments({"a": 1}, [9.0], [0.0], [1.0]), "not the"),
        (lambda m: NormMoments(m.layers, m.count, m.mean * np.nan, m.scatter), "not finite"),
        (lambda m: NormMoments(m.layers, m.count, m.mean, -m.scatter), "negative"),
        (lambda m: NormMoments(m.layers, m.count * 0, m.mean, m.scatter), "below two"),
        (lambda m: NormMoments(m.layers, m.count + 0.5, m.mean, m.scatter), "not an integer"),
        (lambda m: NormMoments(m.layers, m.count, m.mean + 1e39, m.scatter), "larger than"),
    ],
)
def test_impossible_moments_are_not_admitted(opened, change, found):
    plan, tables, network = opened
    good = site_moments(network, tables[:1], plan, CPU, rngs(1), torch.Generator())
    due = Expectation(IDENTITY, "North", measured=weights_of(network))
    assert admit(reply(good), due).accepted
    verdict = admit(reply(change(good)), due)
    assert verdict.code == "STA-202"
    assert found in verdict.detail


def test_a_network_without_batch_norm_has_no_layer_to_measure(tmp_path: Path):
    plan = sites.plan_of(tmp_path, tmp_path, "network.norm=group")
    assert not plan.recalibrates
    assert norm_layers(sites.weights(plan)) == {}
