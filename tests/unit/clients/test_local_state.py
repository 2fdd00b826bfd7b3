"""State that a site keeps between rounds: found by round, bounded, never from a later round."""

import pytest
import torch

from fedsgcg.clients.local_state import KEPT_ROUNDS, LocalState
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.wire.payload import Identity


def state_of(tmp_path, run="run"):
    return LocalState.of(tmp_path, Identity(run, "A", 0, "plan"))


def test_a_round_starts_from_the_newest_earlier_one(tmp_path):
    state = state_of(tmp_path)
    assert state.load(1) == (0, {})
    for number in (1, 2, 3):
        state.store(number, {"x": torch.full((2,), float(number))})
    number, tensors = state.load(4)
    assert number == 3
    assert tensors["x"].tolist() == [3.0, 3.0]
    assert state.load(3)[0] == 2, "a round that is repeated does not see its own first try"
    assert state.load(1) == (0, {}), "a run that begins anew begins fresh"


def test_files_are_few_and_a_repeated_past_drops_the_future(tmp_path):
    state = state_of(tmp_path)
    for number in range(1, 9):
        state.store(number, {"x": torch.zeros(1)})
    assert len(list(state.folder.iterdir())) == KEPT_ROUNDS
    state.store(7, {"x": torch.ones(1)})
    assert state.load(9)[0] == 7
    assert state_of(tmp_path, "other").load(5) == (0, {}), "runs do not share"


def test_a_damaged_file_and_a_full_folder_are_said(tmp_path):
    state = state_of(tmp_path)
    state.store(1, {"x": torch.zeros(1)})
    next(state.folder.iterdir()).write_bytes(b"nonsense")
    with pytest.raises(FedsgcgError, match="SITE-501"):
        state.load(2)
    (tmp_path / "file").write_text("")
    with pytest.raises(FedsgcgError, match="SITE-501"):
        state_of(tmp_path / "file").store(1, {"x": torch.zeros(1)})
