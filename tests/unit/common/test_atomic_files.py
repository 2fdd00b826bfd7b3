"""Files that are written in one piece: the old content or the new one, never a part."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedsgcg.common.files.atomic import replaced, write_file


def write_half(path: Path) -> None:
    path.write_bytes(b"half of the ne")
    raise FileNotFoundError


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state.json"
    write_file(path, b"old")
    with pytest.raises(FileNotFoundError), replaced(path) as temporary:
        write_half(temporary)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_until_the_end_of_the_block_readers_see_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.nii.gz"
    write_file(path, b"old")
    with replaced(path, ending=".partial.nii.gz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_secret_is_private_from_its_creation(tmp_path: Path) -> None:
    path = tmp_path / "server.key"
    path.write_bytes(b"for everybody")
    path.chmod(0o644)
    mask = os.umask(0)
    try:
        with replaced(path, mode=0o600) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            temporary.write_bytes(b"secret")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"secret"


def test_writers_of_the_same_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_file(path, content), contents * 5))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]
