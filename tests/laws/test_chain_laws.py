"""A hash chain: what is read is what was appended, and any other book is broken or shorter."""

import contextlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.common.files.chain import BrokenChainError, open_book, read_book

CONTENTS = st.lists(
    st.dictionaries(
        st.sampled_from("abc"), st.integers() | st.sampled_from(["", "x", "\u00fc"]), max_size=3
    ),
    min_size=1,
    max_size=6,
)


def written(folder: str, contents: list[dict]) -> Path:
    path = Path(folder) / "book.jsonl"
    for content in contents:
        with open_book(path, "") as book:
            book.append(content)
    return path


@given(CONTENTS)
def test_a_book_has_what_was_appended_in_order(contents: list[dict]) -> None:
    with TemporaryDirectory() as folder:
        lines = read_book(written(folder, contents))
    assert [{k: v for k, v in line.items() if k in "abc"} for line in lines] == contents
    assert [line["seq"] for line in lines] == list(range(len(contents)))


@given(CONTENTS, st.data())
def test_every_changed_book_is_broken_or_the_beginning_of_the_old_one(contents, data) -> None:
    with TemporaryDirectory() as folder:
        path = written(folder, contents)
        before = read_book(path)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
        path.write_bytes(content)
        with contextlib.suppress(BrokenChainError):
            after = read_book(path)
            assert after == before[: len(after)], "white space, or a line that was cut off"


@given(CONTENTS, st.data())
def test_lines_cannot_be_left_out_or_swapped(contents, data) -> None:
    with TemporaryDirectory() as folder:
        path = written(folder, contents)
        lines = path.read_text().splitlines(keepends=True)
        order = data.draw(st.permutations(range(len(lines))))
        kept = order[: data.draw(st.integers(1, len(lines)))]
        path.write_text("".join(lines[index] for index in kept))
        if kept == list(range(len(kept))):
            assert len(read_book(path)) == len(kept)
        else:
            with pytest.raises(BrokenChainError):
                read_book(path)


def test_a_crash_in_the_middle_of_a_line_loses_only_that_line(tmp_path: Path) -> None:
    path = written(str(tmp_path), [{"a": 1}, {"a": 2}])
    path.write_text(path.read_text()[:-5])
    with open_book(path, "") as book:
        assert [entry["a"] for entry in book.last] == [1]
        book.append({"a": 3})
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("change", ["cut", "longer", "last", "whole"])
def test_a_book_that_changes_between_two_lines_of_a_process_is_noticed(tmp_path, change) -> None:
    path = written(str(tmp_path), [{"a": number} for number in range(4)])
    lines = path.read_text().splitlines(keepends=True)
    last = lines[-1].replace('"a": 3', '"a": 9')
    changed = {
        "cut": lines[:2],
        "longer": [*lines, "{}\n"],
        "last": [*lines[:-1], last],
        "whole": [lines[0].replace('"a": 0', '"a": 55'), *lines[1:]],
    }[change]
    path.write_text("".join(changed))
    if change == "cut":  # intact by itself: the signed head and the receipts notice it
        with open_book(path, "") as book:
            assert book.count == 2
    else:
        with pytest.raises(BrokenChainError), open_book(path, ""):
            pass
