"""The choices of each settings group: those that are shipped in `configs/`, and a user's own YAML files.

Own files are found in the folder of `--config-dir` (the setting `config_dir`), which has the layout of `configs/`, or
are named themselves: `data=PATH.yaml`. Hydra reads them from its ConfigStore, so that no path has to pass through its
grammar. A file without a `defaults` list starts from the shipped base of its group.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from common.errors import FedsgcgError, Problem, fail
from common.files.system import expand

CONFIGS: Final = Path(__file__).resolve().parents[2] / "configs"

BASES: Final = {
    "data": "_base",
    "network": "unet",
    "method": "source",
    "federation": "by_site",
    "prototypes": "effective",
    "privacy": "floors",
    "site": "local",
    "experiment": "",
}
"""Group -> the shipped file that an own one without a `defaults` list starts from."""

GROUPS: Final = tuple(BASES)
CLASSES: Final = ("method", "network")
"""Groups whose choice may be the import path of a class."""

SUFFIXES: Final = (".yaml", ".yml")
IMPORT_PATH: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class OwnFile:
    """A YAML file of the user that is one choice of a group.

    Attributes:
        group: The group.
        name: What Hydra calls it in that group.
        path: Where it was read.
        text: Its content.
    """

    group: str
    name: str
    path: str
    text: str

    @property
    def node(self) -> dict[str, Any]:
        """The content as Hydra takes it, with the base of its group where it names none.

        Raises:
            FedsgcgError: CFG-001 for text that is not YAML, or not names and values.
        """
        import yaml
        from omegaconf import DictConfig, OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            found = OmegaConf.create(self.text) if self.text.strip() else OmegaConf.create({})
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise _unreadable(self.path, " ".join(str(error).split())) from error
        if not isinstance(found, DictConfig):
            raise _unreadable(self.path, "no names and values")
        tree: dict[str, Any] = OmegaConf.to_container(found, resolve=False)  # type: ignore[assignment]
        base = BASES[self.group]
        if "defaults" not in tree and base:
            tree = {"defaults": [base, "_self_"], **tree}
        if self.group == "data":
            tree.setdefault("name", Path(self.path).stem)
        return tree


def choices_of(group: str, own: Sequence[OwnFile] = ()) -> list[str]:
    """Names that a group offers, e.g. `choices_of("data")`, with those of own files."""
    shipped = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
    named = {file.name for file in own if file.group == group}
    return sorted(name for name in shipped | named if not name.startswith("_"))


def is_file(value: str) -> bool:
    """Whether the value of a group is the path of a YAML file."""
    return value.endswith(SUFFIXES)


def is_import_path(value: str) -> bool:
    """Whether a value is the import path of a class, `package.module:Class`."""
    return IMPORT_PATH.fullmatch(value) is not None


def unquoted(value: str) -> str:
    """Return a value without the quotes around the whole of it."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1].replace("\\" + value[0], value[0])
    return value


def hydra_name(path: str) -> str:
    """Return what Hydra calls a file that was named by its path; the path itself may not fit its grammar.

    Like every name with an underscore before it, it is no choice of its group.
    """
    return f"_file-{sha256(str(expand(path, 'settings')).encode()).hexdigest()[:16]}"


def own_files(directory: str, chosen: Sequence[tuple[str, str]]) -> tuple[OwnFile, ...]:
    """Read the user's own files.

    Args:
        directory: The folder of `--config-dir`, or "".
        chosen: (group, path) of the files that were named themselves.

    Raises:
        FedsgcgError: CFG-001 with everything that is wrong with the folder and the files.
    """
    files = list(_files_of(expand(directory, "config_dir"))) if directory else []
    for group, path in chosen:
        files.append(_read(group, hydra_name(path), expand(path, group)))
    problems: list[Problem] = []
    for file in files:
        try:
            _ = file.node
        except FedsgcgError as error:
            problems += error.problems
    if problems:
        raise FedsgcgError(*problems)
    return tuple(files)


@contextmanager
def offered(own: Sequence[OwnFile]) -> Iterator[None]:
    """Let Hydra find own files, for the time of a composition."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    try:
        for file in own:
            package = "_global_" if file.group == "experiment" else None
            store.store(
                name=file.name,
                node=file.node,
                group=file.group,
                package=package,
                provider=file.path,
            )
        yield
    finally:
        for file in own:
            store.repo.get(file.group, {}).pop(f"{file.name}.yaml", None)


def _files_of(directory: Path) -> Iterator[OwnFile]:
    """Yield the YAML files of a folder with the layout of `configs/`."""
    expected = "a folder with data/, experiment/, method/, network/ (or another group) and YAML files in it"
    if not directory.is_dir():
        found = "a file" if directory.exists() else "no such folder"
        raise fail("CFG-001", where=f"--config-dir {directory}", found=found, expected=expected)
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    problems = [problem for folder in folders for problem in _misspelled(folder)]
    files = sorted(
        path
        for group in GROUPS
        for path in (directory / group).glob("*")
        if path.suffix in SUFFIXES
    )
    if not files and not problems:
        found = ", ".join(path.name for path in folders) or "no folder in it"
        problems.append(
            Problem("CFG-001", where=f"--config-dir {directory}", found=found, expected=expected)
        )
    for path in files:
        if (CONFIGS / path.parent.name / f"{path.stem}.yaml").exists():
            found = f"{path.parent.name}/{path.name}, a name that fedsgcg ships"
            action = f"rename the file, or name it itself: {path.parent.name}={path}"
            problems.append(
                Problem(
                    "CFG-001", where=str(path), found=found, expected="a new name", action=action
                )
            )
    if problems:
        raise FedsgcgError(*problems)
    yield from (_read(path.parent.name, path.stem, path) for path in files)


def _misspelled(folder: Path) -> Iterator[Problem]:
    """Yield a problem for a folder of YAML files that is nearly called like a group: `methods`."""
    if folder.name in GROUPS or not any(path.suffix in SUFFIXES for path in folder.iterdir()):
        return
    if close := difflib.get_close_matches(folder.name.lower(), GROUPS, n=1, cutoff=0.75):
        expected = " | ".join(GROUPS)
        yield Problem(
            "CFG-001",
            f"folder {folder.name!r}",
            expected,
            f"rename it to {close[0]!r}",
            str(folder),
        )


def _read(group: str, name: str, path: Path) -> OwnFile:
    try:
        return OwnFile(group, name, str(path), path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = f"no such file, looked for in {path.absolute().parent}"
        raise fail(
            "CFG-001", where=f"{group}={path}", found=found, expected="a YAML file of settings"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(str(path), " ".join(str(error).split())) from error


def _unreadable(path: str, found: str) -> FedsgcgError:
    return fail(
        "CFG-001", where=path, found=found, expected="a readable YAML file of names and values"
    )
