"""The commands `fedsgcg metrics` and `fedsgcg dashboards`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.console import Screen, add_output_options

PORT: Final = 9464
"""Default port of the metrics, the usual one of OpenTelemetry's Prometheus exporters."""


def add_commands(commands: Any) -> None:
    """Add the commands to `fedsgcg`'s parser."""
    summary = "serve the metrics of a run folder for Prometheus"
    metrics = commands.add_parser("metrics", help=summary, description=summary)
    metrics.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a study, or a folder with studies"
    )
    metrics.add_argument("--port", type=int, default=PORT, help=f"0 = any free one ({PORT})")
    metrics.add_argument("--address", default="127.0.0.1", help="address to bind (127.0.0.1)")
    metrics.add_argument(
        "--textfile", type=Path, metavar="FILE", help="also write a node exporter's text file"
    )
    metrics.add_argument(
        "--pushgateway", default="", metavar="URL", help="also push to a push gateway"
    )
    metrics.add_argument(
        "--once", action="store_true", help="write or push once and end; no endpoint"
    )
    add_output_options(metrics, events=True)
    metrics.set_defaults(run=_metrics)

    summary = "put the dashboards and alerts into a Grafana server, list or remove them"
    dashboards = commands.add_parser("dashboards", help=summary, description=summary)
    actions = dashboards.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("push", "create or update folder, data source, dashboards and alert rules"),
        ("list", "list what is there of them"),
        ("remove", "remove them"),
        ("annotate", "mark the ends of rounds, rejections and resumes of a run"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--url", required=True, help="address of Grafana, https://host:3000")
        action.add_argument(
            "--token-file",
            type=Path,
            required=True,
            metavar="FILE",
            help="file with the token of a service account",
        )
        action.add_argument(
            "--ca", type=Path, metavar="FILE", help="certificate of its authority, for https"
        )
        if name == "push":
            action.add_argument(
                "--prometheus",
                default="http://localhost:9090",
                metavar="URL",
                help="address of Prometheus as Grafana reaches it (http://localhost:9090)",
            )
        if name == "annotate":
            action.add_argument("folder", type=Path, metavar="RUN", help="folder of a study")
        add_output_options(action, events=True)
        action.set_defaults(run=_dashboards)


def _metrics(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.monitoring.metrics import serve_folder

    return serve_folder(
        options.folder,
        console,
        port=options.port,
        address=options.address,
        textfile=options.textfile,
        pushgateway=options.pushgateway,
        once=options.once,
    )


def _dashboards(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.monitoring.grafana import annotate, connected, list_all, push, remove_all

    grafana = connected(options.url, options.token_file, options.ca)
    if options.action == "push":
        return push(grafana, options.prometheus, console)
    if options.action == "annotate":
        return annotate(grafana, options.folder, console)
    return (list_all if options.action == "list" else remove_all)(grafana, console)
