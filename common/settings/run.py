"""Settings of `fedsgcg study` and `simulate` that are not part of a plan: where and how to run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from fedsgcg.common.settings.base import Checks, Section

REFERENCES: Final = ("local", "pooled", "best_single")
"""Rows for comparison that a study can have (`references`)."""


TRACKERS: Final = ("tensorboard", "mlflow")
STORES: Final = ("sqlite:///", "http://", "https://")


@dataclass(frozen=True)
class RaySettings(Section):
    """Settings of Ray, which runs hospitals or cells in parallel.

    Attributes:
        address: `local` starts Ray on this machine; `auto` or `host:port` connects to a cluster.
        cpus: CPU cores that Ray may use; 0 = all.
    """

    address: str = "local"
    cpus: int = 0

    def checks(self) -> Checks:
        """The number of cores is not negative."""
        yield self.cpus >= 0, "cpus", "a whole number, 0 (all) or more"


@dataclass(frozen=True)
class TelemetrySettings(Section):
    """Metrics of a study for Prometheus while it runs (extra `monitoring`).

    Attributes:
        port: Port of the endpoint `/metrics`; 0 = none. `fedsgcg metrics RUN` serves the same of a
            run folder at any time.
        address: Address of the endpoint. Every host that can reach it can read the metrics, which
            contain names of hospitals but nothing of a patient.
        textfile: File for the textfile collector of Prometheus' node exporter; "" = none.
        pushgateway: Address of a push gateway, `http://host:9091`; "" = none.
    """

    port: int = 0
    address: str = "127.0.0.1"
    textfile: str = ""
    pushgateway: str = ""

    def checks(self) -> Checks:
        """The port exists."""
        yield 0 <= self.port <= 65535, "port", "0 (none) to 65535"

    @property
    def is_on(self) -> bool:
        """Whether the metrics go anywhere."""
        return bool(self.port or self.textfile or self.pushgateway)


@dataclass(frozen=True)
class RunSettings(Section):
    """Where and how a study runs.

    Attributes:
        grid: What a study varies: setting -> list of values. Values with commas on the command line
            do the same.
        select: Settings of the grid that each fold's source hospitals choose, instead of comparing
            them.
        references: Rows for comparison, supervised training (`method=source`) without a federation:
            `local`, every hospital alone; `pooled`, all training images in one place;
            `best_single`, of the models of single hospitals the one that does best at the other
            training hospitals, which alone choose it.
        device: Where the sites compute: `auto`, `cpu` or `cuda`. An unavailable device is an error.
        runtime: `ray` runs hospitals in parallel, `inprocess` cells in parallel; `auto` chooses
            what suits the machine.
        output: Folder of the run; "" = `runs/<data>-<hash of the settings>`.
        shard: Part `K/N` of a study's cells, K from 1 to N: this call runs only these, one after
            the other in its own process, without Ray and without a report. The N calls may run at
            the same time, for example as a Slurm job array. The same call without `shard` runs what
            is missing and makes the report.
        config_dir: Folder with own YAML files in `data/`, `experiment/`, `method/`, `network/` (or
            another group); usually given as `--config-dir DIR`.
        ray: Settings of Ray.
        telemetry: Metrics for Prometheus.
        tracking: Experiment trackers that get the curves of a study while it runs: `tensorboard`,
            `mlflow` or both (extras of the same names). They write into the study's folder, and
            nothing leaves the machine.
        mlflow_uri: MLflow store to use instead of the study's own: `sqlite:////FILE`, shared by
            studies, or the `http://` or `https://` address of a tracking server, which then gets
            the names of hospitals, the settings and the figures.
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    select: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    runtime: Literal["auto", "ray", "inprocess"] = "auto"
    output: str = ""
    shard: str = ""
    config_dir: str = ""
    ray: RaySettings = RaySettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    tracking: tuple[str, ...] = ()
    mlflow_uri: str = ""

    def checks(self) -> Checks:
        """The references and trackers exist, and the address is one of MLflow's."""
        yield set(self.references) <= set(REFERENCES), "references", " | ".join(REFERENCES)
        known = set(self.tracking) <= set(TRACKERS)
        once = len(set(self.tracking)) == len(self.tracking)
        yield known and once, "tracking", f"{' | '.join(TRACKERS)}, each once"
        local = self.mlflow_uri == "" or self.mlflow_uri.startswith(STORES)
        yield local, "mlflow_uri", f"an address that starts with {', '.join(STORES)}"
