"""Mutations of bytes, texts, trees and Arrow tables; a function of a random generator each."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa
import yaml

Mutation = Callable[[bytes, random.Random], bytes]

BAD_NUMBERS: Final = (
    *(0, -1, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
)
BAD_VALUES: Final = (
    *BAD_NUMBERS,
    *(None, True, False, "", " ", "\x00", "\x1b[31m", "a\nb", "\ud800", "é" * 300, "1e400"),
    *("../../etc/passwd", "/dev/zero", "${oc.env:HOME}", "!!python/object:os.system", "0x10", "on"),
    *([], {}, [[]], [None], {"": None}, [1, "a", None], ["a"] * 300, {"a": {"b": {"c": []}}}),
)
INTERESTING_BYTES: Final = (0, 1, 0x7F, 0x80, 0xFE, 0xFF, 0x20, 0x0A, 0x22)


def bytes_of(data: bytes, source: random.Random) -> bytes:
    """Change, insert, remove, repeat or cut some bytes; the head is hit as often as the rest."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 6)):
        if not changed:
            return source.randbytes(source.randint(0, 64))
        near_head = source.random() < 0.5
        place = source.randrange(min(len(changed), 400) if near_head else len(changed))
        kind = source.randrange(7)
        if kind == 0:
            changed[place] = source.randrange(256)
        elif kind == 1:
            changed[place] = source.choice(INTERESTING_BYTES)
        elif kind == 2:
            changed[place] ^= 1 << source.randrange(8)
        elif kind == 3:
            changed[place:place] = source.randbytes(source.randint(1, 8))
        elif kind == 4:
            del changed[place : place + source.randint(1, 64)]
        elif kind == 5:
            width = source.choice(("<h", "<i", "<q", ">i", "<f", "<d"))
            number = source.choice(BAD_NUMBERS)
            try:
                word = struct.pack(width, number if width[1] in "fd" else int(number))
            except (struct.error, OverflowError, ValueError):
                word = b"\xff" * struct.calcsize(width)
            changed[place : place + len(word)] = word
        elif source.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def tree_of(tree: Any, source: random.Random) -> Any:
    """Replace, remove, add or rename something in a tree of dictionaries and lists."""
    if isinstance(tree, dict) and tree and source.random() < 0.8:
        name = source.choice(list(tree))
        kind = source.random()
        if kind < 0.6:
            return {**tree, name: tree_of(tree[name], source)}
        if kind < 0.75:
            return {key: value for key, value in tree.items() if key != name}
        if kind < 0.9:
            return {**tree, name: source.choice(BAD_VALUES)}
        return {**tree, source.choice(("", "a", "site", "data.root", "\x00")): tree[name]}
    if isinstance(tree, list) and tree and source.random() < 0.7:
        place = source.randrange(len(tree))
        changed = list(tree)
        kind = source.random()
        if kind < 0.6:
            changed[place] = tree_of(tree[place], source)
        elif kind < 0.8:
            changed.insert(place, source.choice((tree[place], *BAD_VALUES)))
        else:
            del changed[place]
        return changed
    return source.choice(BAD_VALUES)


def json_of(data: bytes, source: random.Random) -> bytes:
    """Change the content of a JSON text, or its bytes."""
    if source.random() < 0.3:
        return bytes_of(data, source)
    tree = json.loads(data)
    for _ in range(source.randint(1, 3)):
        tree = tree_of(tree, source)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def yaml_of(data: bytes, source: random.Random) -> bytes:
    """Change the content of a YAML text, or its bytes."""
    if source.random() < 0.4:
        return bytes_of(data, source)
    tree = yaml.safe_load(data)
    for _ in range(source.randint(1, 3)):
        tree = tree_of(tree, source)
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def csv_of(data: bytes, source: random.Random) -> bytes:
    """Change cells, lines and separators of a CSV text, or its bytes."""
    if source.random() < 0.4:
        return bytes_of(data, source)
    lines = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(source.randint(1, 4)):
        row = source.randrange(len(lines))
        place = source.randrange(len(lines[row])) if lines[row] else 0
        kind = source.randrange(4)
        if kind == 0 and lines[row]:
            lines[row][place] = str(source.choice(BAD_VALUES))
        elif kind == 1:
            lines[row].insert(place, source.choice(('"', "a;b", "", "../x", "site")))
        elif kind == 2:
            lines.insert(row, list(source.choice(lines)))
        elif lines[row]:
            del lines[row][place]
    separator = source.choice((",", ",", ";", "\t"))
    end = source.choice(("\n", "\r\n", "\r"))
    return end.join(separator.join(cells) for cells in lines).encode("utf-8", "surrogatepass")


def arrow_of(data: bytes, source: random.Random) -> bytes:
    """Change the columns, types, rows or metadata of an Arrow stream or file, or its bytes."""
    if source.random() < 0.4:
        return bytes_of(data, source)
    is_file = data.startswith(b"ARROW1")
    opened = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(pa.BufferReader(data))
    with opened as reader:
        table = reader.read_all()
    for _ in range(source.randint(1, 2)):
        table = _table_of(table, source)
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _table_of(table: pa.Table, source: random.Random) -> pa.Table:
    kind = source.randrange(6)
    if kind == 0 or not table.num_columns:
        return _with_metadata(table, source)
    place = source.randrange(table.num_columns)
    name = table.column_names[place]
    if kind == 1:
        return table.drop_columns([name])
    if kind == 2:
        new = source.choice((name, "class", "count", ""))
        return table.append_column(new, table.column(place))
    if kind == 3:
        rows = source.choice((0, 1, table.num_rows, 300))
        return table.take(
            [source.randrange(table.num_rows) for _ in range(rows if table.num_rows else 0)]
        )
    values = table.column(place).to_pylist()
    if kind == 4:
        values = [_value_of(value, source) for value in values]
        wanted = source.choice((table.schema.field(place).type, None))
    else:
        wanted = source.choice((pa.string(), pa.float32(), pa.int8(), pa.binary(), pa.null()))
        values = [None] * len(values) if pa.types.is_null(wanted) else values
    try:
        column = pa.array(values, wanted)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return table
    changed = table.set_column(place, pa.field(name, column.type), column)
    return changed.replace_schema_metadata(table.schema.metadata)


def _value_of(value: Any, source: random.Random) -> Any:
    if isinstance(value, list) and value:
        changed = list(value)
        changed[source.randrange(len(changed))] = source.choice(BAD_NUMBERS)
        return changed if source.random() < 0.8 else changed[:-1]
    return source.choice((value, *BAD_VALUES)) if source.random() < 0.5 else value


def _with_metadata(table: pa.Table, source: random.Random) -> pa.Table:
    metadata = dict(table.schema.metadata or {})
    name = source.choice([*metadata, b"new"])
    value = metadata.get(name, b"")
    kind = source.random()
    if kind < 0.2:
        metadata.pop(name, None)
    elif kind < 0.5:
        metadata[name] = bytes_of(value, source)
    else:
        text = source.choice(BAD_VALUES)
        metadata[name] = (
            json.dumps(text).encode() if kind < 0.7 else str(text).encode("utf-8", "surrogatepass")
        )
    return table.replace_schema_metadata(metadata)


def safetensors_of(data: bytes, source: random.Random) -> bytes:
    """Change the header, the facts in it, or the bytes of a safetensors file."""
    if source.random() < 0.4:
        return bytes_of(data, source)
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    facts = header.get("__metadata__", {})
    if "fedsgcg" in facts and source.random() < 0.6:
        changed = json_of(facts["fedsgcg"].encode(), source).decode("utf-8", "replace")
        header["__metadata__"] = {**facts, "fedsgcg": changed}
    else:
        header = tree_of(header, source)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + rest


def png_of(data: bytes, source: random.Random) -> bytes:
    """Change a chunk of a PNG and write its checksum again, or change the bytes."""
    if source.random() < 0.4:
        return bytes_of(data, source)
    stream, chunks = io.BytesIO(data[8:]), []
    while head := stream.read(8):
        size, kind = struct.unpack(">I4s", head)
        chunks.append((kind, stream.read(size)))
        stream.read(4)
    place = source.randrange(len(chunks))
    kind, content = chunks[place]
    chunks[place] = (kind, bytes_of(content, source))
    if source.random() < 0.2:
        chunks.insert(place, (source.choice((b"tRNS", b"PLTE", b"acTL", b"eXIf")), content))
    parts = [
        struct.pack(">I4s", len(content), kind)
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return data[:8] + b"".join(parts)


def gzip_of(data: bytes, source: random.Random) -> bytes:
    """Change the content of a gzip file and compress it again, or change its bytes."""
    import gzip

    if source.random() < 0.3:
        return bytes_of(data, source)
    return gzip.compress(bytes_of(gzip.decompress(data), source), 1, mtime=0)


def text_head_of(end: bytes) -> Mutation:
    """Return a mutation of a file that starts with lines of text, such as MetaImage or NRRD.

    Args:
        end: The bytes with which the text ends.
    """

    def mutate(data: bytes, source: random.Random) -> bytes:
        if source.random() < 0.3:
            return bytes_of(data, source)
        head, mark, rest = data.partition(end)
        lines = head.split(b"\n")
        for _ in range(source.randint(1, 3)):
            _change_line(lines, source)
        return b"\n".join(lines) + mark + rest

    return mutate


def _change_line(lines: list[bytes], source: random.Random) -> None:
    """Replace, remove, repeat or damage a line, or a word of it."""
    if not lines:
        return
    place, kind = source.randrange(len(lines)), source.random()
    words = lines[place].split(b" ")
    if kind < 0.5:
        word = str(source.choice(BAD_VALUES)).encode("utf-8", "surrogatepass")
        words[source.randrange(len(words))] = word
        lines[place] = b" ".join(words)
    elif kind < 0.65:
        lines[place] = b" ".join([*words, source.choice(words)])
    elif kind < 0.75:
        del lines[place]
    elif kind < 0.85:
        lines.insert(source.randrange(len(lines) + 1), lines[place])
    else:
        lines[place] = bytes_of(lines[place], source)
