"""Draw the dashboards' panels from a real study: `python docs/panels.py FOLDER`.

Runs the demonstration with metrics, lets a real Prometheus scrape it, sends each panel's query to
that Prometheus, and draws the answers as docs/dashboards.png. A Grafana server is not needed: the
picture shows what the queries return, in Grafana's arrangement.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fedsgcg.deploy.monitoring.dashboards import FEDERATION, HOSPITALS, PROTOTYPES, Panel  # noqa: E402
from fedsgcg.deploy.site.commands import free_port  # noqa: E402
from tests.support.monitoring import Prometheus, prometheus  # noqa: E402

SHOWN = (
    (FEDERATION, ("Mean training loss", "Dice on the source hospitals' validation cases")),
    (HOSPITALS, ("Time to the reply", "Dice on validation cases")),
    (PROTOTYPES, ("Shift between hospitals, share of the variance", "Trace within hospitals")),
)
UNITS = {"s": "seconds", "percentunit": "share"}


def curves(server: Prometheus, query: str, start: float, end: float) -> list[dict[str, Any]]:
    """Return the series of a query over time."""
    for name in ("study", "method", "heldout", "seed"):
        query = query.replace(f"${name}", ".*")
    asked = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": "1"})
    with urllib.request.urlopen(f"{server.address}/api/v1/query_range?{asked}") as answer:  # noqa: S310
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def draw(axes: Axes, panel: Panel, series: list[dict[str, Any]]) -> None:
    """Draw one panel."""
    for one in series:
        name = panel.legend
        for label in re.findall(r"\{\{(\w+)\}\}", name):
            name = name.replace(f"{{{{{label}}}}}", one["metric"].get(label, ""))
        times = [datetime.fromtimestamp(float(moment)) for moment, _ in one["values"]]
        axes.plot(times, [float(value) for _, value in one["values"]], label=name, linewidth=1.6)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_ylabel(UNITS.get(panel.unit, ""), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_formatter(mpl.dates.DateFormatter("%H:%M:%S"))
    axes.xaxis.set_major_locator(mpl.dates.AutoDateLocator(maxticks=6))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, frameon=False)


def main(folder: Path) -> None:
    """Run the study and draw."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    study = [
        *(sys.executable, "-m", "fedsgcg.deploy.cli.coordinator", "study", "experiment=demo"),
        *("method=source,sgcg", "heldout=North", "federation.rounds=12"),
        *(f"output={folder / 'study'}", f"telemetry.port={port}"),
    ]
    with prometheus(folder, f"127.0.0.1:{port}") as server:
        start = time.time()
        subprocess.run(study, check=True, cwd=ROOT)  # noqa: S603
        figure, places = plt.subplots(len(SHOWN), 2, figsize=(12, 10.5), layout="constrained")
        for row, (dashboard, titles) in zip(places, SHOWN, strict=True):
            panels = {panel.title: panel for panel in dashboard.panels}
            for axes, title in zip(row, titles, strict=True):
                panel = panels[title]
                draw(axes, panel, curves(server, panel.query, start, time.time()))
        figure.savefig(ROOT / "docs" / "dashboards.png", dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/panels.py FOLDER")
    main(Path(sys.argv[1]).resolve())
