"""Out of memory in a step: the round restarts in smaller parts, and the user is informed."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsgcg.clients.device import choose_device
from fedsgcg.clients.local_state import LocalState
from fedsgcg.clients.methods.running_guide import Overlay
from fedsgcg.clients.out_of_memory import out_of_memory
from fedsgcg.clients.training import train_round, weights_of
from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.heads import build_trained
from fedsgcg.common.networks import UNet, build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Request
from fedsgcg.deploy.site.check_step import measure_step
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.deploy.study.run import run_study
from fedsgcg.server.report.rounds import cut_steps
from tests.support import sites
from tests.support.one_site import network_of, opened

CPU = torch.device("cpu")
MORE_THAN_THERE_IS = 2**50  # bytes: beyond the address space of a process


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("memory")
    return sites.hospitals(folder / "data"), folder


def needing_much(network: UNet, slices: int, calls: int = 0) -> list[int]:
    """Let a training pass over more than `most` slices fail for lack of memory, after some passes.

    Returns:
        The slices of each pass that failed.
    """
    failed: list[int] = []
    passes = iter(range(10**6))

    def ask(module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        if module.training and len(given[0]) > slices and next(passes) >= calls:
            failed.append(len(given[0]))
            torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)

    network.register_forward_pre_hook(ask)
    return failed


def some_statistics(plan: Plan, seed: int, pixels: int) -> ClassStatistics:
    rng = np.random.default_rng(seed)
    features = np.abs(rng.normal(size=(pixels, plan.network.num_features)))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return ClassStatistics.from_features(features, rng.integers(0, 2, pixels), 2)


def caught(work) -> BaseException:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_what_an_allocation_that_fails_raises_is_known():
    assert out_of_memory(caught(lambda: torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)))
    assert out_of_memory(caught(lambda: np.empty(MORE_THAN_THERE_IS, np.uint8)))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not out_of_memory(caught(lambda: torch.zeros(2) @ torch.zeros(3)))
    assert not out_of_memory(caught(lambda: choose_device("cuda"))) or torch.cuda.is_available()


def test_an_error_that_followed_a_failed_allocation_counts_and_an_unrelated_one_does_not():
    def cut_off():
        try:
            torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def own():
        try:
            torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
        except RuntimeError:
            raise ValueError("a mistake of the program")  # noqa: B904 - the context is the point

    assert out_of_memory(caught(cut_off))
    assert not out_of_memory(caught(own))


@pytest.mark.parametrize(("method", "calls"), [("source", 0), ("ram_sgcg", 2)])
@pytest.mark.row(30)
def test_a_round_that_ran_out_of_memory_is_the_round_that_had_small_parts_from_the_start(
    hospital, method, calls
):
    """Also after two steps: weights, BatchNorm, moments, decoder, overlay and streams are reset."""
    options = f"method={method}", "federation.moments=keep", "prototypes.memory=overlay"
    options = *options, "method.steps_per_round=3"
    plan, store = opened(hospital, *options)
    small, _ = opened(hospital, *options, "site.micro_batches=2")
    others, own = some_statistics(plan, 1, 900), some_statistics(plan, 2, 400)

    def two_rounds(of: Plan, fails: bool):
        network, state, figures = network_of(of), {}, []
        failed: list[int] = []
        for number in (1, 2):
            if fails and number == 2:
                failed = needing_much(network, 2, calls)
                of = plan
            guide = Overlay(others, own, of, CPU)
            found, state = train_round(
                network,
                [store],
                of,
                round_number=number,
                guide=guide,
                device=CPU,
                state=state or None,
            )
            figures.append(found)
        return weights_of(network).digest(), state, figures, failed

    digest, state, figures, failed = two_rounds(small, fails=True)
    expected, state_of_small, figures_of_small, _ = two_rounds(small, fails=False)
    assert failed == [4]
    assert figures[1]["micro_batches"] == figures_of_small[1]["micro_batches"] == 2
    assert digest == expected
    assert {name for name in state if name != "micro_batches"} == set(state_of_small)
    assert any(name.startswith("adam.") for name in state)
    for name, tensor in state_of_small.items():
        assert torch.equal(state[name], tensor), name
    kept = {"seconds", "micro_batches"}
    assert {k: v for k, v in figures[1].items() if k not in kept} == {
        k: v for k, v in figures_of_small[1].items() if k not in kept
    }


def test_what_the_site_had_kept_is_as_it_was_after_a_round(hospital):
    plan, store = opened(
        hospital, "method=ram", "federation.moments=keep", "method.steps_per_round=2"
    )
    _, state = train_round(network_of(plan), [store], plan, round_number=1, guide=None, device=CPU)
    before = {name: tensor.clone() for name, tensor in state.items()}
    train_round(
        network_of(plan), [store], plan, round_number=2, guide=None, device=CPU, state=state
    )
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_the_next_round_begins_with_the_parts_that_fitted_also_from_the_disk(hospital, tmp_path):
    plan, store = opened(hospital, "method=source")
    network = network_of(plan)
    failed = needing_much(network, 2)
    kept = LocalState.of(tmp_path, sites.identity(plan))
    figures, state = train_round(network, [store], plan, round_number=1, guide=None, device=CPU)
    assert figures["micro_batches"] == 2
    kept.store(1, state)
    figures, _ = train_round(
        network, [store], plan, round_number=2, guide=None, device=CPU, state=kept.load(2)[1]
    )
    assert figures["micro_batches"] == 2
    assert failed == [4], "the first round alone tried the whole step"


def test_a_site_that_never_ran_out_of_memory_keeps_nothing_of_it(hospital):
    plan, store = opened(hospital, "method=source", "site.micro_batches=2")
    figures, state = train_round(
        network_of(plan), [store], plan, round_number=1, guide=None, device=CPU
    )
    assert figures["micro_batches"] == 2
    assert state == {}


def test_more_parts_than_a_step_has_are_told_as_they_are(hospital):
    plan, store = opened(hospital, "site.micro_batches=64")  # four slices: two parts of two
    figures, _ = train_round(
        network_of(plan), [store], plan, round_number=1, guide=None, device=CPU
    )
    assert figures["micro_batches"] == 2


def test_the_site_is_told(hospital, caplog):
    plan, store = opened(hospital, "method=source")
    network = network_of(plan)
    needing_much(network, 2)
    with caplog.at_level(logging.WARNING, "fedsgcg.site"):
        train_round(network, [store], plan, round_number=3, guide=None, device=CPU)
    (record,) = caplog.records
    assert "does not fit into the memory" in record.getMessage()
    assert record.args == (3, 4, "cpu", 2)  # round, slices of a step, device, parts


@pytest.mark.row(30)
def test_a_step_that_fits_in_no_parts_is_an_error_that_says_what_to_do(hospital):
    plan, store = opened(hospital, "method=source", "method.batch_size=10")
    network = network_of(plan)
    failed = needing_much(network, 1)
    with pytest.raises(FedsgcgError) as raised:
        train_round(network, [store], plan, round_number=1, guide=None, device=CPU)
    (problem,) = raised.value.problems
    assert failed == [10, 5, 3, 2]  # in 1, 2, 4 and at last 5 parts
    assert problem.code == "SITE-502"
    assert "10 slices of 32 pixels in 5 parts" in problem.found
    assert "data.image_size" in problem.action


def test_any_other_error_of_a_step_is_not_tried_again(hospital):
    plan, store = opened(hospital, "method=source")
    network, calls = network_of(plan), []

    def stop(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("a mistake of the program")

    network.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="a mistake of the program"):
        train_round(network, [store], plan, round_number=1, guide=None, device=CPU)
    assert len(calls) == 1


def test_memory_that_ends_outside_of_training_has_its_code_too(hospital, monkeypatch):
    root, folder = hospital
    plan = sites.plan_of(root, folder)

    def describes(*_: object) -> None:
        torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)

    monkeypatch.setattr("fedsgcg.clients.app.site_statistics", describes)
    request = Request(sites.identity(plan), sites.weights(plan))
    assert sites.answer(plan, wire.STATISTICS, request, "North").error == "SITE-502"


def test_the_doctor_measures_a_step_as_training_would_take_it(hospital, monkeypatch):
    plan, _ = opened(hospital, "method.batch_size=8")

    def fitting(slices: int):
        def built(*given: object, **named: object) -> UNet:
            network = build_network(*given, **named)
            needing_much(network, slices)
            return network

        return built

    monkeypatch.setattr("fedsgcg.deploy.site.check_step.build_network", fitting(3))
    assert measure_step(plan, CPU).parts == 4
    monkeypatch.setattr("fedsgcg.deploy.site.check_step.build_network", fitting(1))
    with pytest.raises(FedsgcgError) as raised:
        measure_step(plan, CPU)
    assert raised.value.code == "SITE-502"
    assert "in 4 parts" in raised.value.problems[0].found


# messages to the user


def test_a_study_says_on_the_console_and_in_its_report_who_ran_out_of_memory(
    hospital, tmp_path, monkeypatch
):
    def built(*given: object, **named: object) -> UNet:
        network = build_trained(*given, **named)
        needing_much(network, 2)
        return network

    monkeypatch.setattr("fedsgcg.clients.app.build_trained", built)
    root, _ = hospital
    words = (
        "method=source",
        "heldout=South",
        "federation.rounds=2",
        f"data.root={root}",
        "runtime=inprocess",
    )
    places = f"output={tmp_path / 'study'}", f"site.cache={tmp_path / 'cache'}"
    small = [text for text in sites.SMALL if not text.startswith("federation.rounds")]
    said = io.StringIO()
    console = Screen(said, width=400)
    assert run_study(plan_study([*small, *words, *places]), console) == 0
    told = "North into 2 parts. The effective batch size is the same"
    assert f"source · South · seed 0: batches that did not fit into memory were split: {told}" in (
        said.getvalue()
    )
    assert told in (tmp_path / "study" / "report.html").read_text()


def test_nothing_is_told_of_steps_that_were_whole():
    rows = [
        {"metric": "micro_batches", "site": "North", "value": 1.0},
        {"metric": "loss", "site": "B", "value": 9.0},
    ]
    assert cut_steps(rows) == ""
    rows += [
        {"metric": "micro_batches", "site": site, "value": value}
        for site, value in (("B", 8.0), ("B", 2.0))
    ]
    assert "B into 2 or 8 parts." in cut_steps(rows)
