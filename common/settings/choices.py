"""The choices of each group of settings: files in `configs/`, and a user's own YAML files.

Own files are in the folder of `--config-dir` (the setting `config_dir`), which has the layout of
`configs/`, or are given by path: `data=PATH.yaml`. Hydra reads them from its ConfigStore, so that
paths are not subject to its grammar. A file without a `defaults` list starts from the base of its
group.
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

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.system import expand

CONFIGS: Final = Path(__file__).resolve().parents[2] / "configs"

BASES: Final = {
    "data": "_base",
    "augmentation": "default",
    "network": "unet",
    "method": "source",
    "federation": "by_site",
    "prototypes": "default",
    "privacy": "floors",
    "site": "local",
    "experiment": "",
}
"""Group -> the shipped file from which an own file without a `defaults` list starts."""

GROUPS: Final = tuple(BASES)
CLASSES: Final = ("method", "network")
"""Groups whose choice may be the import path of a class."""

PACKAGES: Final = {"augmentation": "data.augmentation", "experiment": "_global_"}
"""Group -> the section that its files are about, where it is not the one of the group's name."""

SUFFIXES: Final = (".yaml", ".yml")
IMPORT_PATH: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class OwnFile:
    """A user's YAML file that is a choice of a group.

    Attributes:
        group: The group.
        name: Its name in Hydra.
        path: Its path.
        text: Its content.
    """

    group: str
    name: str
    path: str
    text: str

    @property
    def node(self) -> dict[str, Any]:
        """The content for Hydra, with the base of its group if it has no `defaults`.

        Raises:
            FedsgcgError: CFG-001 for text that is not YAML or not a mapping.
        """
        import yaml
        from omegaconf import DictConfig, OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            found = OmegaConf.create(self.text) if self.text.strip() else OmegaConf.create({})
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise _unreadable(self.path, " ".join(str(error).split())) from error
        if not isinstance(found, DictConfig):
            raise _unreadable(self.path, "no names with values")
        tree: dict[str, Any] = OmegaConf.to_container(found, resolve=False)  # type: ignore[assignment]
        base = BASES[self.group]
        if "defaults" not in tree and base:
            tree = {"defaults": [base, "_self_"], **tree}
        if self.group == "data":
            tree.setdefault("name", Path(self.path).stem)
        return tree


def choices_of(group: str, own: Sequence[OwnFile] = ()) -> list[str]:
    """Return the choices of a group, e.g. `choices_of("data")`, including own files."""
    shipped = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
    named = {file.name for file in own if file.group == group}
    return sorted(name for name in shipped | named if not name.startswith("_"))


def is_file(value: str) -> bool:
    """Whether a choice is the path of a YAML file."""
    return value.endswith(SUFFIXES)


def is_import_path(value: str) -> bool:
    """Whether a value is the import path of a class, `package.module:Class`."""
    return IMPORT_PATH.fullmatch(value) is not None


def unquoted(value: str) -> str:
    """Return a value without enclosing quotes."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1].replace("\\" + value[0], value[0])
    return value


def hydra_name(path: str) -> str:
    """Return the name in Hydra of a file given by path, as its grammar does not allow every path.

    Like every name with a leading underscore, it is not listed as a choice of its group.
    """
    return f"_file-{sha256(str(expand(path, 'settings')).encode()).hexdigest()[:16]}"


def own_files(directory: str, chosen: Sequence[tuple[str, str]]) -> tuple[OwnFile, ...]:
    """Read the user's own files.

    Args:
        directory: The folder of `--config-dir`, or "".
        chosen: (group, path) of the files given by path.

    Raises:
        FedsgcgError: CFG-001 with all problems of the folder and the files.
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
    """Make own files available to Hydra for one composition."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    try:
        for file in own:
            store.store(
                name=file.name,
                node=file.node,
                group=file.group,
                package=PACKAGES.get(file.group),
                provider=file.path,
            )
        yield
    finally:
        for file in own:
            store.repo.get(file.group, {}).pop(f"{file.name}.yaml", None)


def _files_of(directory: Path) -> Iterator[OwnFile]:
    """Yield the YAML files of a folder with the layout of `configs/`."""
    expected = (
        "a folder that contains data/, experiment/, method/, network/ (or another group) "
        "with YAML files"
    )
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
        found = ", ".join(path.name for path in folders) or "no folders"
        problems.append(
            Problem("CFG-001", where=f"--config-dir {directory}", found=found, expected=expected)
        )
    for path in files:
        if (CONFIGS / path.parent.name / f"{path.stem}.yaml").exists():
            found = f"{path.parent.name}/{path.name}, the name of a choice that fedsgcg provides"
            action = f"rename the file, or give its path: {path.parent.name}={path}"
            problems.append(
                Problem(
                    "CFG-001", where=str(path), found=found, expected="a new name", action=action
                )
            )
    if problems:
        raise FedsgcgError(*problems)
    yield from (_read(path.parent.name, path.stem, path) for path in files)


def _misspelled(folder: Path) -> Iterator[Problem]:
    """Yield a problem for a folder with YAML files and nearly the name of a group: `methods`."""
    if folder.name in GROUPS or not any(path.suffix in SUFFIXES for path in folder.iterdir()):
        return
    if close := difflib.get_close_matches(folder.name.lower(), GROUPS, n=1, cutoff=0.75):
        expected = " | ".join(GROUPS)
        yield Problem(
            "CFG-001",
            found=f"folder {folder.name!r}",
            expected=expected,
            action=f"rename it to {close[0]!r}",
            where=str(folder),
        )


def _read(group: str, name: str, path: Path) -> OwnFile:
    try:
        return OwnFile(group, name, str(path), path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        parent = path.absolute().parent
        there = sorted(file.name for file in parent.glob("*") if file.suffix in SUFFIXES)
        close = difflib.get_close_matches(path.name, there, n=1)
        raise fail(
            "CFG-001",
            where=f"{group}={path}",
            found=f"no such file, looked for in {parent}",
            expected="a YAML file of settings",
            action=f"did you mean {close[0]!r}?" if close else "",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(str(path), " ".join(str(error).split())) from error


def _unreadable(path: str, found: str) -> FedsgcgError:
    return fail(
        "CFG-001", where=path, found=found, expected="a readable YAML file with names and values"
    )
