"""The worker process of a site: loads one app bundle and answers messages until its socket closes.

`deploy.site.resident` starts this file as a script, so that no module of the site's installed
package is imported before the bundle's own code, and isolated from the environment and from
bytecode (`deploy.isolated`). The bundle's modules come from contents that were compared with
the approved hashes, whatever happens in its folder afterwards. Python, Flower and torch are loaded
once instead of for every message (a plain SuperNode starts a process per message). The socket is
inherited from the resident; no other process can reach it.

A frame is its length in eight bytes (big endian), followed by that many bytes. Messages are
Flower's protobuf, never pickles.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import json
import os
import socket
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

LENGTH = struct.Struct(">Q")
PRELOADED = (
    "numpy",
    "pyarrow",
    "torch",
    "torch.utils.data",
    "yaml",
    "flwr.clientapp",
    "flwr.common.serde",
)
"""Libraries that every bundle needs, loaded before the first message arrives."""

PARENT_POLL_S = 1.0
MOST_FRAME_BYTES = 4 * 2**30
"""Longest frame; memory is allocated when its length has arrived."""


def send_frame(link: socket.socket, content: bytes) -> None:
    """Send one frame."""
    link.sendall(LENGTH.pack(len(content)) + content)


def receive_frame(link: socket.socket, end: float | None = None) -> bytes:
    """Receive one frame.

    Args:
        link: The socket.
        end: `time.monotonic()` at which the whole frame must have arrived; None waits for ever,
            as a worker does between two messages.

    Raises:
        EOFError: The other end has closed or died, or states an impossible length.
        TimeoutError: The frame is late.
    """
    (length,) = LENGTH.unpack(_exactly(link, LENGTH.size, end))
    if length > MOST_FRAME_BYTES:
        raise EOFError(f"a frame of {length} bytes")
    return bytes(_exactly(link, length, end))


def _exactly(link: socket.socket, length: int, end: float | None) -> bytearray:
    content = bytearray(length)
    view, done = memoryview(content), 0
    while done < length:
        if end is not None:
            link.settimeout(max(0.001, end - time.monotonic()))
        count = link.recv_into(view[done:])
        if not count:
            raise EOFError("the other end has closed")
        done += count
    return content


def serve(link: socket.socket) -> None:
    """Load the bundle named by the first frame, then answer messages.

    A request is (identity, message, context), the answer (message, context); one frame for each.
    """
    for name in PRELOADED:
        importlib.import_module(name)
    from flwr.common.serde import (
        context_from_proto,
        context_to_proto,
        message_from_proto,
        message_to_proto,
    )
    from flwr.proto.message_pb2 import Context as ProtoContext
    from flwr.proto.message_pb2 import Message as ProtoMessage
    from flwr.supercore.task_identity import TaskIdentity

    send_frame(link, b"ready")
    facts = json.loads(receive_frame(link))
    app = _load(facts["folder"], facts["files"], facts["app"])
    while True:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = json.loads(
            receive_frame(link)
        )
        message = message_from_proto(ProtoMessage.FromString(receive_frame(link)))
        context = context_from_proto(ProtoContext.FromString(receive_frame(link)))
        reply = app(message, context)
        send_frame(link, message_to_proto(reply).SerializeToString())
        send_frame(link, context_to_proto(context).SerializeToString())


def _load(folder: str, files: dict[str, str], reference: str) -> Any:
    """Import the bundle's client app, giving the bundle's folder precedence over other packages.

    Args:
        folder: Folder of the unpacked bundle.
        files: Path in the folder -> SHA-256, as approved.
        reference: The client app, as `module:attribute`.
    """
    sources = _approved_files(Path(folder), files)
    sys.path_hooks.insert(0, _only_from(folder, sources))
    sys.path.insert(0, folder)
    module, _, attribute = reference.partition(":")
    app: Any = importlib.import_module(module)
    if not os.path.realpath(app.__file__).startswith(os.path.realpath(folder) + os.sep):
        raise ImportError(f"{module} is not part of the app bundle")
    for name in attribute.split("."):
        app = getattr(app, name)
    return app


def _approved_files(folder: Path, files: dict[str, str]) -> dict[str, bytes]:
    """Read the bundle's files once: absolute path -> content.

    Raises:
        ImportError: A file was added, is missing, or is not the approved one.
    """
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_dir()
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    if digests != files:
        names = sorted(name for name, _ in {*digests.items()} ^ {*files.items()})
        raise ImportError(f"not the approved files: {', '.join(names[:8])}")
    return {str(folder / name): content for name, content in found.items()}


def _only_from(folder: str, sources: dict[str, bytes]) -> Any:
    """Return a path hook that loads modules below a folder from contents that were checked.

    What is written into the folder afterwards never runs, nor does any bytecode or library in it.
    """

    class Loader(importlib.machinery.SourceFileLoader):
        def get_data(self, path: str) -> bytes:
            if path not in sources:
                raise OSError(f"{path} is not part of the app bundle")
            return sources[path]

        def path_stats(self, path: str) -> Any:
            raise OSError("no bytecode is read for the app bundle")

    def hook(path: str) -> importlib.machinery.FileFinder:
        if path != folder and not path.startswith(folder + os.sep):
            raise ImportError("not the app bundle")
        return importlib.machinery.FileFinder(path, (Loader, [".py"]))

    return hook


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, even during training."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def main() -> None:
    """Serve on the inherited socket (first argument) until the resident (second argument) ends."""
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    with socket.socket(fileno=int(sys.argv[1])) as link:
        try:
            serve(link)
        except EOFError:
            return
        except Exception:
            # The trace may name a patient: it stays in the site's log, and the resident sends a
            # code.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


if __name__ == "__main__":
    main()
