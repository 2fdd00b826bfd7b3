"""Every decoder: a mutated input gives an object or an error code, in bounded memory.

`make fuzz` tries 100,000 inputs; here are a few of each decoder, always the same, and those that
once did something else.
"""

import os
import signal
from pathlib import Path

import pytest

from tests.faults.fuzz.__main__ import Run
from tests.faults.fuzz.mutations import bytes_of
from tests.faults.fuzz.runner import CORPUS, bounded_memory, fuzz, fuzz_apart, outcome
from tests.faults.fuzz.targets import Target, targets

CASES = 40


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.row(9, 10, 11, 12, 37, 41)
@pytest.mark.timeout(120)
def test_law_mutated_inputs_give_an_object_or_a_code(decoders: dict[str, Target]) -> None:
    faults: dict[str, tuple[str, bytes]] = {}
    for target in decoders.values():
        fuzz(target, max(3, round(CASES / target.cost)), 0, outcome, faults)
    assert faults == {}


def test_honest_inputs_are_read(decoders: dict[str, Target]) -> None:
    found = {
        target.name: [outcome(target, seed) for seed in target.seeds]
        for target in decoders.values()
        if target.name != "site"  # its folders do not exist
    }
    assert {code for codes in found.values() for code in codes} == {"valid"}, found


@pytest.mark.timeout(120)
def test_inputs_that_once_broke_a_decoder_are_read_or_refused(decoders: dict[str, Target]) -> None:
    kept = [path for path in sorted(CORPUS.rglob("*")) if path.is_file()]
    with bounded_memory():
        for path in kept:
            assert outcome(decoders[path.parent.name], path.read_bytes())


def crash(data: bytes) -> None:
    if len(data) % 2:
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_input_that_ends_the_process_is_found(tmp_path: Path) -> None:
    """A library in C may crash: the run goes on and has the input."""
    seen, faults = fuzz_apart(Target("c", (b"ab",), crash, bytes_of), 100, 0, tmp_path)
    ((kind, (_, data)),) = faults.items()
    assert kind == "c: ended by signal 9"
    assert len(data) % 2
    assert seen["fault"] == 1


def test_a_run_that_is_cut_short_has_reached_every_decoder(tmp_path: Path) -> None:
    few = [
        Target(name, (b"ab",), len, bytes_of, cost)
        for name, cost in zip("xyz", (1, 2, 99), strict=True)
    ]
    run = Run(few, tmp_path)
    run.turns(10**9, seed=0, end=0.0)
    assert [counts.total() for counts in run.seen.values()] == [40, 20, 1]
    run.turns(200, seed=1, end=float("inf"))
    assert 200 <= run.cases < 300
    assert "z " in run.report()
