"""Fixed cost and seconds per empty round of a 4-hospital federation, against plain Flower.

Each run is a separate process. All move the same network (RAM-DSIR U-Net, 3.19 M parameters)
without training: a site loads the weights that it receives and returns them, so that only the
framework is measured.

    plain      Flower's FedAvg strategy on Ray, one array per tensor, as in the quick-start example
    ray        fedsgcg's coordinator and wire format on Ray (hospitals in parallel)
    inprocess  fedsgcg's coordinator and wire format in one process (a cell of a study)

Fixed cost = seconds from the start of the process to the end of round 1; a round = mean of the
later rounds. CPU seconds are those of the process and of the children it has waited for, without
Ray's actors.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import ratio, row, show

ROUNDS = 8
SITES = ("A", "B", "C", "D")
KINDS = ("plain", "ray", "inprocess")
REPEATS = 3


def run() -> list[dict[str, Any]]:
    """Time the kinds in turn, `REPEATS` times, and return rows with ratios to plain Flower."""
    times: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in KINDS} for name in ("fixed", "round", "cpu")
    }
    for _ in range(REPEATS):
        for kind in KINDS:
            for name, seconds in _timed(kind).items():
                times[name][kind].append(seconds)
    case = f"{len(SITES)} sites, 3.19 M parameters, nobody trains"
    rows = []
    for name, title in (
        ("fixed", "fixed cost"),
        ("round", "seconds a round"),
        ("cpu", "CPU seconds of the run"),
    ):
        for kind in KINDS:
            middle = statistics.median(times[name][kind])
            rows.append(row("federation", case, f"{title}, {kind}", middle, "s"))
        for kind in KINDS[1:]:
            gain = ratio(times[name], "plain", kind)
            rows.append(
                row("federation", case, f"{title}, plain / {kind}", gain, "x", ">= 1", gain[0] >= 1)
            )
    return show(rows)


def _timed(kind: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.bench_federation", kind, folder]
        started = time.time()
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        report = json.loads(done.stdout.strip().splitlines()[-1])
    ends: list[float] = report["round_ends"]
    return {
        "fixed": ends[0] - started,
        "round": (ends[-1] - ends[0]) / (len(ends) - 1),
        "cpu": report["cpu"],
    }


def _child(kind: str, folder: Path) -> dict[str, Any]:
    from fedsgcg.deploy.environment import prepare_environment, quiet_flower

    prepare_environment()
    quiet_flower()
    ends = _run_plain() if kind == "plain" else _run_ours(kind, folder)
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "round_ends": ends,
        "cpu": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
    }


def _run_plain() -> list[float]:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from fedsgcg.common.networks import UNet

    client = ClientApp()
    server = ServerApp()
    ends = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        network = UNet()
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        metrics = MetricRecord({"num-examples": 10})
        content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    class Timed(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            merged = super().aggregate_train(server_round, replies)
            ends.append(time.time())
            return merged

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_evaluate=0.0, min_available_nodes=len(SITES), min_train_nodes=len(SITES)
        )
        strategy.start(grid, ArrayRecord(UNet().state_dict()), num_rounds=ROUNDS)

    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"log_to_driver": False},
    }
    run_simulation(server, client, len(SITES), backend_config=backend)
    return ends


def _run_ours(kind: str, folder: Path) -> list[float]:
    from fedsgcg.common.settings.compose import join
    from fedsgcg.deploy.study.inprocess import run_in_process
    from fedsgcg.deploy.study.preflight import inspect_machine
    from fedsgcg.deploy.study.runtimes import ray_arguments
    from fedsgcg.server.app import build_server_app

    tree = join([f"federation.rounds={ROUNDS}", "method=source", f"output={folder}"])
    tree["data"]["sites"] = list(SITES)
    client = _echo_app()
    server = build_server_app(tree)
    if kind == "inprocess":
        run_in_process(server, client, SITES)
    else:
        from flwr.simulation import run_simulation

        backend = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": ray_arguments(inspect_machine(), "local"),
        }
        run_simulation(server, client, len(SITES), backend_config=backend)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [float(event["time"]) for event in events if event["event"] == "round.done"]


def _echo_app() -> Any:
    """Return a client app that enrols, loads the weights it receives and returns them untrained."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    from fedsgcg.clients.training import load_weights, weights_of
    from fedsgcg.common.networks import build_network
    from fedsgcg.common.settings.plan import NetworkSettings
    from fedsgcg.common.wire.messages import Reply, decode_request, encode_reply
    from fedsgcg.common.wire.payload import encode_cases

    app = ClientApp()

    def site_of(context: Context) -> str:
        return str(
            context.node_config.get("site") or SITES[int(context.node_config["partition-id"])]
        )

    @app.query("enrol")
    def enrol(message: Message, context: Context) -> Message:
        request, site = decode_request(message.content), site_of(context)
        counts = {"train": 10, "validation": 0, "test": 0}
        details = {
            "site": site,
            "roles": ["train"],
            "cases": counts,
            "patients": counts,
            "slices": counts,
            "problems": [],
        }
        return Message(
            encode_reply(Reply(request.identity, site, details=details)), reply_to=message
        )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = decode_request(message.content)
        network = build_network(NetworkSettings(), 3, 2, generator_seed=None)  # as in clients.app
        assert request.weights
        load_weights(network, request.weights)
        metrics = {
            "examples": 10.0,
            "loss": 1.0,
            "loss_supervised": 1.0,
            "loss_contrast": 0.0,
            "steps": 1.0,
            "seconds": 0.0,
        }
        reply = Reply(request.identity, site_of(context), weights_of(network), metrics=metrics)
        return Message(encode_reply(reply), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        request = decode_request(message.content)
        return Message(
            encode_reply(Reply(request.identity, site_of(context), cases=encode_cases([]))),
            reply_to=message,
        )

    return app


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], Path(sys.argv[2]))))
