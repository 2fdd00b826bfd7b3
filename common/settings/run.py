"""Settings of a call of `fedsgcg study` or `simulate` that are no part of a plan: where and how it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from common.settings.base import Checks, Section


@dataclass(frozen=True)
class RaySettings(Section):
    """Ray, which runs the hospitals or the cells in parallel.

    Attributes:
        address: `local` starts Ray on this machine; `auto` or `host:port` uses a running cluster.
        cpus: CPU cores that Ray may use; 0 = all.
    """

    address: str = "local"
    cpus: int = 0

    def checks(self) -> Checks:
        """Cores are counted."""
        yield self.cpus >= 0, "cpus", "a whole number, 0 (all) or more"


@dataclass(frozen=True)
class RunSettings(Section):
    """Where and how a study runs.

    Attributes:
        grid: What a study varies: setting -> list of values. Values with commas on the command line do the same.
        select: Settings among those that vary which each fold's source hospitals choose, instead of being compared.
        device: Where the sites compute: `auto`, `cpu` or `cuda`. A device that is not there is an error.
        runtime: `ray` runs hospitals in parallel, `inprocess` cells in parallel; `auto` takes what suits the machine.
        output: Folder of the run; "" = `runs/<data>-<hash of the settings>`.
        config_dir: Folder with own YAML files in `data/`, `experiment/`, `method/`, `network/` (or another group);
            usually given as `--config-dir DIR`.
        ray: How Ray is started.
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    select: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    runtime: Literal["auto", "ray", "inprocess"] = "auto"
    output: str = ""
    config_dir: str = ""
    ray: RaySettings = RaySettings()
