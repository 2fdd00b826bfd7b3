"""`site.yaml`: a hospital's folders and what it allows.

The coordinator's kit fills in the names; the hospital fills in the folders and decides the rest.
The file is never sent. Relative paths are resolved against the folder of the file, so that a kit
can be moved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fedsgcg.common.errors import Problem
from fedsgcg.common.files.system import expand
from fedsgcg.common.image_summary import IMAGE_SUMMARY
from fedsgcg.common.images.contents import CONTENT_HASHES
from fedsgcg.common.settings.base import Checks, Section
from fedsgcg.common.settings.choices import is_import_path
from fedsgcg.common.settings.federation import ROLES, SITE_STATISTICS
from fedsgcg.common.settings.yaml_file import build_from, explained, read_tree

VERSION: Final = 1
SHARED_BY_DEFAULT: Final = ("weights", "statistics")
CASE_CONSENT: Final = {"test": "heldout_cases", "validation": "training_cases"}
"""Split -> the entry of `sharing` that lets the results of its single cases leave."""
CONTROL_VARIATES: Final = "control_variates"
"""Record of SCAFFOLD's control variates in a message (`common.wire.messages.CONTROL`)."""
SHARED_BY_CONSENT: Final = (
    *("amplitude_summary", "amplitude_bank", CONTROL_VARIATES, CONTENT_HASHES),
    *(SITE_STATISTICS, IMAGE_SUMMARY),
    *CASE_CONSENT.values(),
)
MAY_SET: Final = (
    *("seed", "heldout", "observers", "unlabelled", "run", "label", "setting", "chosen"),
    *("data.*", "network.*", "method.*", "federation.*", "prototypes.*", "privacy.*"),
    "adapt.*",
)
"""Settings that the coordinator may set by default; never `data.root` and `site.*`."""

NEVER_SET: Final = (
    "data.root",
    "output",
    "site.home",
    "site.cache",
    "site.roles",
    "site.device",
    "site.threads",
)
PATHS: Final = ("ca", "key", "data_root", "home", "cache", "approved")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}")
"""Allowed names of sites and projects: they become folders, settings and certificate subjects."""


@dataclass(frozen=True)
class SiteFile(Section):
    """A hospital's own settings, with absolute paths.

    Attributes:
        site: Name of this hospital in the federation.
        project: Name of the federation.
        server: The coordinator, as `host:port`.
        ca: Certificate of the coordinator's own certificate authority (PEM), the only one that is
            trusted.
        key: This hospital's private key (EC P-384, OpenSSH format, mode 0600).
        data_root: Folder of the hospital's images, with `manifest.csv` or a folder named like the
            site. It is only read.
        home: Folder for the ledger, the error log, the aliases and the state of this site.
        cache: Folder for the slice cache.
        approved: File with the hashes of the app bundles that this hospital has approved.
        code: Import paths (`package.module:Class`) of methods and networks from outside the
            approved bundle that may run here. The hospital installs the package itself; the
            installed code is not checked again.
        roles: Roles this hospital accepts.
        sharing: What may leave: `weights` and `statistics`; `amplitude_summary`, `amplitude_bank`,
            `control_variates`, `site_statistics`, `heldout_cases`, `training_cases`,
            `content_hashes` and `image_summary` only if the hospital adds them here.
            `site_statistics` lets the coordinator send this hospital's class statistics on to the
            other hospitals, for `method.sgcg.sites`. `control_variates` is the mean gradient of a round, for
            `federation.aggregator=scaffold`. `heldout_cases` and `training_cases` are the results
            of single cases under an alias, where this hospital is held out or observes, and of its
            validation cases; without them mean, standard deviation and number of cases leave,
            rounded. `content_hashes` are salted hashes of the images. With them the coordinator
            finds images that two hospitals share, and can check whether this hospital has an image
            that the coordinator itself has; no image can be reconstructed from them.
            `image_summary` are medians and quartiles of size, voxel size and values of the training
            images (docs/explanation/plan.md).
        patient_floor: Fewest patients that any figure covers: a class, a validation or test result,
            a round of training, and the difference of any two of them. The larger of this and the
            plan's floor applies.
        min_pixels: A class with fewer pixels is withheld; the larger of this and the plan's floor
            applies.
        validation_fraction: Share of this hospital's patients that is kept for validation; replaces
            the coordinator's. Which patients these are depends on a secret of this hospital, unless
            `manifest.csv` states the splits.
        round_slices: Fewest slices that a round of training may use; its patients must reach
            `patient_floor`.
        releases: Most messages with weights, statistics or amplitudes that leave; a repeated
            request counts once.
        evaluations: Most evaluations of a model.
        device: Device of the site: `auto`, `cpu`, `cuda` (all GPUs), or one GPU such as `cuda:0`.
        threads: CPU threads of a training process.
        coordinator_may_set: Names of the plan's settings that the coordinator may set; a trailing
            `*` selects a group.
        deadline_s: Seconds after which the watchdog ends the processing of a message; 0 = the
            plan's round deadline.
        runtime_port: Port on 127.0.0.1 through which the site's own processes communicate; 0 = any
            free port.
        max_retries: Attempts to reach the coordinator before the site gives up; 0 = unlimited.
        max_image_size: Largest side of a training slice in pixels. This and the following limits
            are checked before anything is built; a request beyond one is refused (POL-707).
        max_batch_size: Most slices of a training step.
        max_epochs: Most passes over the slices in one round.
        max_steps: Most training steps in one round, if the plan counts steps.
        max_rounds: Most rounds of one run.
        max_cache_gb: Most gigabytes of `cache`; slice files that were not used for longest are
            removed before a request is refused.
        max_memory_gb: Most gigabytes that a training step on the CPU, or the conversion of one
            image, may need as estimated; 0 = three quarters of the machine's memory. On a GPU a
            step that does not fit is split.
        version: Version of this file format.
    """

    site: str
    project: str
    server: str
    ca: str
    key: str
    data_root: str
    home: str
    cache: str
    approved: str
    code: tuple[str, ...] = ()
    roles: tuple[str, ...] = ROLES
    sharing: tuple[str, ...] = SHARED_BY_DEFAULT
    patient_floor: int = 2
    min_pixels: int = 1000
    validation_fraction: float = 0.2
    round_slices: int = 8
    releases: int = 50_000
    evaluations: int = 1_000
    device: str = "auto"
    threads: int = 1
    coordinator_may_set: tuple[str, ...] = MAY_SET
    deadline_s: float = 0.0
    runtime_port: int = 0
    max_retries: int = 0
    max_image_size: int = 1024
    max_batch_size: int = 256
    max_epochs: int = 100
    max_steps: int = 50_000
    max_rounds: int = 5_000
    max_cache_gb: float = 200.0
    max_memory_gb: float = 0.0
    version: Literal[1] = 1

    def checks(self) -> Checks:
        """Check names, address, floors, ports and the entries of lists."""
        yield (
            bool(NAME.fullmatch(self.site)),
            "site",
            "letters, digits, spaces and ._- (at most 63)",
        )
        yield (
            bool(NAME.fullmatch(self.project)),
            "project",
            "letters, digits, spaces and ._- (at most 63)",
        )
        yield (
            split_address(self.server) is not None,
            "server",
            "host:port, e.g. federation.example.org:8443",
        )
        yield all(map(is_import_path, self.code)), "code", "import paths, package.module:Class"
        yield bool(self.roles) and set(self.roles) <= set(ROLES), "roles", " | ".join(ROLES)
        known = (*SHARED_BY_DEFAULT, *SHARED_BY_CONSENT)
        yield set(self.sharing) <= set(known), "sharing", " | ".join(known)
        yield self.patient_floor >= 1, "patient_floor", "1 or more"
        yield self.min_pixels >= 1, "min_pixels", "1 or more"
        for name in ("round_slices", "releases", "evaluations"):
            yield getattr(self, name) >= 1, name, "1 or more"
        fraction = self.validation_fraction
        yield 0 <= fraction < 1, "validation_fraction", "a fraction in [0, 1)"
        yield (
            bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)),
            "device",
            "auto | cpu | cuda | cuda:0",
        )
        yield self.threads >= 1, "threads", "1 or more"
        outside = [
            name
            for name in self.coordinator_may_set
            if name in NEVER_SET or name.startswith("site.")
        ]
        yield not outside, "coordinator_may_set", "no setting of the site itself"
        yield self.deadline_s >= 0, "deadline_s", "seconds, 0 or more"
        yield 0 <= self.runtime_port <= 65535, "runtime_port", "a port, or 0 for any free port"
        for name in ("image_size", "batch_size", "epochs", "steps", "rounds"):
            yield getattr(self, f"max_{name}") >= 1, f"max_{name}", "1 or more"
        yield self.max_cache_gb > 0, "max_cache_gb", "gigabytes, more than zero"
        yield self.max_memory_gb >= 0, "max_memory_gb", "gigabytes, or 0 for the machine's"
        yield self.max_retries >= 0, "max_retries", "0 (unlimited) or more"

    def may_set(self, name: str) -> bool:
        """Return whether the coordinator may set a plan setting such as `data.classes`."""
        if name in NEVER_SET or name.startswith("site."):
            return False
        rules = self.coordinator_may_set
        return any(
            name == rule or (rule.endswith("*") and name.startswith(rule[:-1])) for rule in rules
        )


def read_site_file(path: Path) -> SiteFile:
    """Read a `site.yaml` and make its relative paths absolute.

    Args:
        path: The file, or the kit's folder with `site.yaml`.

    Raises:
        FedsgcgError: DEP-601 with every problem of the file, including paths that are still empty.
    """
    path = path / "site.yaml" if path.is_dir() else path
    tree = read_tree(path, "DEP-601", "name the kit's folder, or its site.yaml")
    folder = path.resolve().parent
    absolute = {
        name: str(folder / expand(str(tree[name]), name)) for name in PATHS if tree.get(name)
    }
    empty = tuple(
        Problem(
            "DEP-601",
            found="an empty value",
            expected="a path",
            action="fill it in",
            where=f"{path}, {name}",
        )
        for name in PATHS
        if name in tree and not tree[name]
    )
    return build_from(SiteFile, {**tree, **absolute}, path, "DEP-601", empty)


def write_site_file(path: Path, site: SiteFile) -> None:
    """Write a `site.yaml` with an explanation of each setting; paths are written unchanged."""
    path.write_text(site_file_text(site), encoding="utf-8")


def site_file_text(site: SiteFile) -> str:
    """Return the text of a `site.yaml`: every setting with its explanation."""
    head = (
        f"{site.site} in the federation {site.project}. "
        "This file belongs to the hospital and is never sent.",
        "It overrides what the coordinator requests. Relative paths start at this folder.",
    )
    return explained(site, head)


def split_address(address: str) -> tuple[str, int] | None:
    """Return host and port of `host:port` or `[v6]:port`; None for anything else."""
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host or " " in host:
        return None
    return host, int(port)
