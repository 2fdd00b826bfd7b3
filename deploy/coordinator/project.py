"""The project file, in which a coordinator describes a federation, and the coordinator's kit."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from fedsgcg.clients.guard.site_file import NAME, NEVER_SET, split_address
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.settings.base import Checks, Section
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.federation import ALL_SITES, LIMITS, limit_checks
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.yaml_file import build_from, explained, read_tree

FORMER_KEYS: Final = {"requested": "site"}
"""Former value of `keys` -> its name now."""


@dataclass(frozen=True)
class Project(Section):
    """A federation, as its coordinator describes it.

    Attributes:
        name: Name of the federation.
        server: Where hospitals reach the coordinator, as `host:port`; the only port that must be
            open.
        sites: Names of the hospitals. A name added later gets its kit at the next `fedsgcg
            provision`.
        plan: Settings of the study, as on the command line of `fedsgcg simulate`; `fedsgcg run` may
            change them.
        limits: The most patients and slices that a hospital can have, e.g. `{North: {patients: 300,
            slices: 9000}, all: {slices: 20000}}`; `all` is for hospitals without own numbers. A
            hospital that declares more cannot join, so that none can own the model.
        quorum: Training sites that must join and answer each round; 0 = all of them.
        join_deadline_s: Seconds to wait for the sites at the start.
        round_deadline_s: Seconds that a round may take.
        listen: Address that the server binds; "" = all interfaces, or loopback if `server` is
            loopback.
        control_port: Port on 127.0.0.1 for the coordinator's own commands; 0 = the port after the
            public one.
        names: Further host names and addresses by which hospitals may reach the server.
        keys: `site` = the hospital makes its key (`fedsgcg-site request`) and sends only the public
            key; `issued` = the key is made here with the kit, so this machine has seen it.
        certificate_days: Days for which the server's certificate is valid.
        data_root: Folder of the images in new kits, e.g. `/data` if all hospitals use containers;
            "" = each hospital fills it in.
    """

    name: str
    server: str
    sites: tuple[str, ...]
    plan: tuple[str, ...] = ()
    limits: dict[str, dict[str, int]] = field(default_factory=dict)
    quorum: int = 0
    join_deadline_s: float = 600.0
    round_deadline_s: float = 3600.0
    listen: str = ""
    control_port: int = 0
    names: tuple[str, ...] = ()
    keys: Literal["site", "issued"] = "site"
    certificate_days: int = 398
    data_root: str = ""

    def checks(self) -> Checks:
        """Check that names are plain and distinct, addresses have ports, numbers are positive."""
        yield (
            bool(NAME.fullmatch(self.name)),
            "name",
            "letters, digits, spaces and ._- (63 at most)",
        )
        yield (
            split_address(self.server) is not None,
            "server",
            "host:port, e.g. federation.example.org:8443",
        )
        plain = all(NAME.fullmatch(site) for site in self.sites)
        folded = {site.casefold() for site in self.sites}
        yield (
            plain and len(folded) == len(self.sites) >= 2,
            "sites",
            "two or more distinct plain names",
        )
        yield 0 <= self.quorum <= len(self.sites), "quorum", "0 (all) to the number of sites"
        yield from limit_checks(self.limits)
        unknown = set(self.limits) - {*self.sites, ALL_SITES}
        yield not unknown, "limits", f"names of sites, or {ALL_SITES}"
        yield self.join_deadline_s > 0, "join_deadline_s", "seconds, more than zero"
        yield self.round_deadline_s > 0, "round_deadline_s", "seconds, more than zero"
        yield (
            0 <= self.control_port <= 65535,
            "control_port",
            "a port, or 0 for the one after the public port",
        )
        yield 1 <= self.certificate_days <= 825, "certificate_days", "1 to 825 days"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `server`."""
        found = split_address(self.server)
        if found is None:
            raise AssertionError("checks() rejects a server without a port")
        return found

    @property
    def host_to_bind(self) -> str:
        """Address that the server binds."""
        return self.listen or ("127.0.0.1" if is_loopback(self.address[0]) else "0.0.0.0")  # noqa: S104

    @property
    def control_address(self) -> str:
        """Address of the server for the coordinator's own commands."""
        return f"127.0.0.1:{self.control_port or self.address[1] % 65535 + 1}"

    @property
    def certificate_names(self) -> list[str]:
        """Names for which the server's certificate is valid."""
        return list(dict.fromkeys([self.address[0], *self.names]))

    def missing_limits(self) -> Problem | None:
        """Return a warning that names the sites whose patients or slices nothing bounds."""
        everyone = self.limits.get(ALL_SITES, {})
        missing = [
            site for site in self.sites if set(LIMITS) - {*everyone, *self.limits.get(site, {})}
        ]
        if not missing:
            return None
        most = f"{LIMITS['slices']:,} training slices"
        example = f"limits: {{{missing[0]}: {{patients: 300, slices: 9000}}}}"
        return Problem(
            "DEP-617",
            found=f"no numbers for {', '.join(missing)}: "
            f"one that claims {most} outweighs all others",
            action=f"ask each hospital how many it has, and write e.g. {example}; or bound its "
            "share of the model, e.g. federation.most_share=0.5",
            where="limits of project.yaml",
        )

    def settings(self, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
        """Resolve the study's settings; those of a command line override the project's.

        Raises:
            FedsgcgError: CFG-001 for every invalid setting.
        """
        own = (
            f"federation.quorum={self.quorum}",
            f"federation.join_deadline_s={self.join_deadline_s}",
            f"federation.round_deadline_s={self.round_deadline_s}",
        )
        theirs = [
            text for text in (*self.plan, *overrides) if _is_the_sites(text.partition("=")[0])
        ]
        if theirs:
            action = "leave it out: each hospital sets it in its own site.yaml"
            raise FedsgcgError(
                *(Problem("CFG-001", text, "a setting of the study", action) for text in theirs)
            )
        merged = {text.partition("=")[0]: text for text in (*own, *self.plan, *overrides)}
        tree = join(list(merged.values()))
        tree["data"] = {**tree["data"], "root": "", "sites": sorted(self.sites)}
        if self.limits:
            tree["federation"] = {**tree["federation"], "limits": self.limits}
        return tree


@dataclass(frozen=True)
class SubmittedRun:
    """A run that was submitted with a kit.

    Attributes:
        run_id: Flower's run id.
        folder: The cell's run folder.
        overrides: Settings of the command line.
        bundle: Hash of the app bundle.
        time: When it was submitted, in seconds since 1970.
    """

    run_id: int
    folder: str
    overrides: tuple[str, ...]
    bundle: str
    time: float


@dataclass(frozen=True)
class Kit:
    """The coordinator's kit, as made by `fedsgcg provision`.

    Attributes:
        folder: Folder of the kit.
    """

    folder: Path

    @classmethod
    def at(cls, path: Path) -> Kit:
        """Return the coordinator's kit in a folder, or in the folder of all kits.

        Raises:
            FedsgcgError: DEP-604 when neither contains a kit.
        """
        for folder in (path, path / "coordinator"):
            if (folder / "project.yaml").is_file() and (folder / "token").is_file():
                return cls(folder.resolve())
        action = "make it: fedsgcg provision project.yaml -o " + str(path)
        raise FedsgcgError(Problem("DEP-604", where=str(path), found="no kit here", action=action))

    @property
    def keys(self) -> Path:
        """Folder of the sites' public keys, `NAME.pub` each; only these keys are registered."""
        return self.folder / "keys"

    @property
    def revoked(self) -> Path:
        """Folder of revoked public keys, which are never registered again."""
        return self.folder / "revoked"

    @property
    def token(self) -> Path:
        """File of the coordinator's token."""
        return self.folder / "token"

    @property
    def state(self) -> Path:
        """Folder of the server's database, logs and Flower's own files."""
        return self.folder / "state"

    @property
    def runs(self) -> Path:
        """Folder of the run folders."""
        return self.folder / "runs"

    @property
    def last_run_file(self) -> Path:
        """File that records the run submitted last; missing before the first run."""
        return self.state / "run.json"

    def project(self) -> Project:
        """Read the project of this kit."""
        return read_project(self.folder / "project.yaml")

    def last_run(self) -> SubmittedRun:
        """Read the run that was submitted last.

        Raises:
            FedsgcgError: DEP-613 when no run was submitted, SRV-402 when the file is damaged.
        """
        path = self.last_run_file
        try:
            found = json.loads(path.read_text())
            return SubmittedRun(**{**found, "overrides": tuple(found["overrides"])})
        except FileNotFoundError as error:
            action = f"fedsgcg run {self.folder}"
            raise fail(
                "DEP-613", where=str(self.folder), found="no state/run.json", action=action
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise fail(
                "SRV-402", where=str(path), found="a damaged record", action="remove it"
            ) from error

    def record_run(self, run: SubmittedRun) -> None:
        """Record a run as the one submitted last."""
        Disk().write(self.last_run_file, (json.dumps(asdict(run), indent=1) + "\n").encode())


def read_project(path: Path) -> Project:
    """Read and check a project file, including its plan.

    Raises:
        FedsgcgError: DEP-602 for every problem in the file.
    """
    tree = read_tree(
        path,
        "DEP-602",
        "write one with name, server and sites; see docs/how-to/found-a-federation.md",
    )
    if isinstance(sites := tree.get("sites"), Mapping):
        tree["sites"] = list(sites)
    tree["keys"] = FORMER_KEYS.get(str(tree.get("keys", "site")), tree.get("keys", "site"))
    project = build_from(Project, tree, path, "DEP-602")
    try:
        settings = project.settings()
        Plan.from_tree({**settings, "output": "runs"})
    except FedsgcgError as error:
        faults = (
            Problem("DEP-602", p.found, p.expected, p.action, f"{path}, plan: {p.where}")
            for p in error.problems
        )
        raise FedsgcgError(*faults) from error
    return project


def project_text(project: Project) -> str:
    """Return the text of a project file, with every setting explained."""
    return explained(project, (f"The federation {project.name}, as its coordinator describes it.",))


def _is_the_sites(name: str) -> bool:
    return name in NEVER_SET or name.startswith("site.")


def is_loopback(host: str) -> bool:
    """Return whether an address or name is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
