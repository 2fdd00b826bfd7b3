"""Every reader of a format: a mutated file gives an image or an error code, in bounded memory."""

import pytest

from tests.faults.fuzz.formats import format_targets
from tests.faults.fuzz.runner import CORPUS, bounded_memory, fuzz, outcome
from tests.faults.fuzz.targets import Target

CASES = 60


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {one.name: one for one in format_targets(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.timeout(120)
def test_law_mutated_files_of_every_format_give_an_image_or_a_code(
    decoders: dict[str, Target],
) -> None:
    faults: dict[str, tuple[str, bytes]] = {}
    for target in decoders.values():
        fuzz(target, max(3, round(CASES / target.cost)), 0, outcome, faults)
    assert {kind: text for kind, (text, _) in faults.items()} == {}


def test_honest_files_of_every_format_are_read(decoders: dict[str, Target]) -> None:
    found = {target.name: outcome(target, target.seeds[0]) for target in decoders.values()}
    assert set(found.values()) == {"valid"}, found


def test_files_that_once_broke_a_reader_are_read_or_refused(decoders: dict[str, Target]) -> None:
    with bounded_memory():
        for target in decoders.values():
            for path in sorted((CORPUS / target.name).glob("*")):
                assert outcome(target, path.read_bytes())
