"""What the code of an app bundle can do, as far as its source names it.

A search for imports and calls in the syntax tree. It helps a reviewer to find the places to read;
it is no proof, because Python code can hide a name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Final

NETWORK: Final = "open a network connection"
PROGRAMS: Final = "start a program or load native code"
DYNAMIC: Final = "run code that is not in the bundle"
ENVIRONMENT: Final = "read environment variables"
FILES: Final = "read or write files"
UNREADABLE: Final = "not valid Python"

MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    NETWORK: (
        *("socket", "ssl", "http", "urllib", "ftplib", "smtplib", "poplib", "imaplib", "telnetlib"),
        *("xmlrpc", "socketserver", "asyncio", "requests", "httpx", "aiohttp", "websockets"),
        *("grpc", "paramiko", "boto3", "zmq", "urllib3", "torch.distributed", "torch.hub"),
    ),
    PROGRAMS: ("subprocess", "ctypes", "cffi", "multiprocessing", "pty", "triton"),
    DYNAMIC: (
        *("importlib", "runpy", "imp", "code", "codeop", "marshal", "zipimport", "pkgutil"),
        *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"),
    ),
    FILES: ("shutil", "tempfile", "glob", "fileinput", "mmap", "sqlite3", "dbm", "h5py", "zarr"),
}
"""Ability -> modules whose import shows it."""

CALLS: Final[Mapping[str, tuple[str, ...]]] = {
    PROGRAMS: (
        *("os.system", "os.popen", "os.fork", "os.forkpty", "os.startfile", "os.posix_spawn"),
        *("os.execl", "os.execle", "os.execlp", "os.execv", "os.execve", "os.execvp"),
        *("os.spawnl", "os.spawnv", "os.spawnve", "os.spawnvp"),
    ),
    DYNAMIC: ("eval", "exec", "compile", "__import__", "torch.load"),
    ENVIRONMENT: ("os.environ", "os.getenv", "os.putenv"),
    FILES: (
        *("open", "os.open", "os.remove", "os.unlink", "os.rename", "os.walk", "os.listdir"),
        *("os.scandir", "np.load", "np.save", "np.fromfile", "np.memmap", "torch.save"),
    ),
}
"""Ability -> dotted names whose use shows it."""

METHODS: Final = (
    *("read_text", "read_bytes", "write_text", "write_bytes", "unlink", "rglob", "iterdir"),
    *("touch", "rmdir", "mkdir"),
)
"""Methods of `pathlib.Path`."""


def abilities(code: Mapping[str, bytes]) -> dict[str, dict[str, list[str]]]:
    """Return ability -> file -> the names that show it, for the Python files of a bundle."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(code):
        if not name.endswith(".py"):
            continue
        for ability, what in dict.fromkeys(_of_source(code[name])):
            found.setdefault(ability, {}).setdefault(name, []).append(what)
    return found


def new_abilities(
    before: Mapping[str, bytes], now: Mapping[str, bytes]
) -> dict[str, dict[str, list[str]]]:
    """Return what `now` can do in a file in which `before` could not."""
    old = abilities(before)
    new: dict[str, dict[str, list[str]]] = {}
    for ability, files in abilities(now).items():
        for name, whats in files.items():
            added = [what for what in whats if what not in old.get(ability, {}).get(name, [])]
            if added:
                new.setdefault(ability, {})[name] = added
    return new


def _of_source(source: bytes) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield UNREADABLE, "unreadable"
        return
    for node in ast.walk(tree):
        for imported in _imports(node):
            for ability, modules in MODULES.items():
                if any(imported == each or imported.startswith(f"{each}.") for each in modules):
                    yield ability, imported
        used = _dotted(node)
        for ability, names in CALLS.items():
            if used in names:
                yield ability, used
        if isinstance(node, ast.Attribute) and node.attr in METHODS:
            yield FILES, f".{node.attr}"


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _dotted(node: ast.AST) -> str:
    """Return `a.b` for an attribute of a name and `a` for a name, "" for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}".replace("numpy.", "np.")
    return node.id if isinstance(node, ast.Name) else ""
