"""Seconds per empty round of a real federation on loopback, compared with plain Flower.

Both use TLS, node keys and three sites and move the same network (RAM-DSIR U-Net, 3.19 M
parameters) over the same type of SuperLink, one after the other, without training: a site loads the
weights that it receives and returns them.

    plain   flower-supernode as it is; FedAvg, one array per tensor; a process for every message
    ours    fedsgcg-site join: a resident warm process; one flat array; fedsgcg's coordinator

A round is the time between the ends of two rounds. The second table shows the cost of a message
inside one site, without transport: a warm process against a new one (start of Python, imports of
Flower and torch).
"""

from __future__ import annotations

import inspect
import json
import shutil
import statistics
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_federation import _echo_app
from tests.benchmarks.harness import row, show

ROUNDS = 3
SITES = ("A", "B", "C")
MESSAGES = 3
DATABASE = ":flwr-in-memory:"
"""In memory for both: with a file, the plain app's many objects caused "database is locked"."""

PLAIN_PROJECT = """\
[project]
name = "plain"
version = "1.0.0"
description = "the quick-start app"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "plain.app:server"
clientapp = "plain.app:client"
[tool.flwr.app.config]
ends = ""
"""

PLAIN_APP = """\
import time
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from plain.networks import UNet

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    network = UNet()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord({"num-examples": 10})
    content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        merged = super().aggregate_train(server_round, replies)
        with open(self.ends, "a") as file:
            file.write(f"{time.time()}\\n")
        return merged


@server.main()
def main(grid, context):
    strategy = Timed(fraction_evaluate=0.0, min_available_nodes=SITES, min_train_nodes=SITES)
    strategy.ends = context.run_config["ends"]
    strategy.start(grid, ArrayRecord(UNet().state_dict()), num_rounds=ROUNDS)
"""


def run() -> list[dict[str, Any]]:
    """Time both federations, then a message inside a site, and return the rows."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        seconds = {kind: _rounds(kind, Path(name) / kind) for kind in ("plain", "ours")}
        cold, warm = _messages(Path(name) / "messages")
    case = f"{len(SITES)} sites on loopback, TLS, 3.19 M parameters, nobody trains"
    rows = []
    for kind, times in seconds.items():
        spread = statistics.quantiles(times, n=4, method="inclusive")
        rows.append(
            row(
                "deployment",
                case,
                f"seconds a round, {kind}",
                (spread[1], spread[0], spread[2]),
                "s",
            )
        )
    gain = statistics.median(seconds["plain"]) / statistics.median(seconds["ours"])
    rows.append(
        row("deployment", case, "seconds a round, plain / ours", gain, "x", ">= 2", gain >= 2)
    )
    rows.append(row("deployment", "inside one site", "a message with a new process", cold, "s"))
    rows.append(row("deployment", "inside one site", "a message with the warm process", warm, "s"))
    return show(rows)


def _rounds(kind: str, folder: Path) -> list[float]:
    """Return the seconds between the ends of the rounds of one federation."""
    from tests.support.loopback import loopback

    folder.mkdir()
    with loopback(folder, DATABASE) as federation:
        app = folder / "app"
        (_write_plain if kind == "plain" else _write_ours)(app)
        for site in SITES:
            kit = federation.kit(site, folder)
            federation.register(kit)
            if kind == "plain":
                _start_plain(federation, kit)
            else:
                _approve(app, kit)
                federation.join(kit)
        for site in SITES:
            federation.await_line(site, "SuperNode ID" if kind == "plain" else "connected to")
        if kind == "plain":
            file = folder / "ends"
            run_id = federation.submit_config(app, f"ends='{file}'")
            status = federation.wait(run_id, 900)
            ends = [float(line) for line in file.read_text().split()]
        else:
            settings = [
                f"federation.rounds={ROUNDS}",
                "method=source",
                f"data.sites=[{','.join(SITES)}]",
            ]
            run_id = federation.submit(app, settings)
            status = federation.wait(run_id, 900)
            (events,) = (folder / "coordinator/runs" / run_id).rglob("events.jsonl")
            found = [json.loads(line) for line in events.read_text().splitlines()]
            ends = [float(event["time"]) for event in found if event["event"] == "round.done"]
        if status != "finished:completed" or len(ends) != ROUNDS:
            raise RuntimeError(
                f"{kind}: {status} after {len(ends)} rounds\n{federation.said('superlink')[-3000:]}"
            )
    return [second - first for first, second in zip(ends, ends[1:], strict=False)]


def _start_plain(federation: Any, kit: Path) -> None:
    from fedsgcg.deploy.site.commands import free_port

    home = kit / "flwr"
    home.mkdir()
    federation.start(
        kit.name,
        *("flower-supernode", "--root-certificates", str(kit / "ca.crt")),
        *(
            "--superlink",
            f"127.0.0.1:{federation.port}",
            "--auth-supernode-private-key",
            str(kit / "site.key"),
        ),
        *("--host", "127.0.0.1", "--port", str(free_port())),
        FLWR_HOME=str(home),
    )


def _write_plain(app: Path) -> None:
    from fedsgcg.common import networks

    package = app / "plain"
    package.mkdir(parents=True)
    (app / "pyproject.toml").write_text(PLAIN_PROJECT)
    (package / "__init__.py").write_text("")
    numbers = PLAIN_APP.replace("SITES", str(len(SITES))).replace("ROUNDS", str(ROUNDS))
    (package / "app.py").write_text(numbers)
    shutil.copytree(
        Path(networks.__file__).parent, app / "common", ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "networks.py").write_text("from fedsgcg.common.networks import UNet\n")


def _write_ours(app: Path) -> None:
    """Write fedsgcg's bundle with a client app that does not train."""
    from tests.conftest import REPOSITORY

    app.mkdir(parents=True)
    for name in ("fedsgcg", "clients", "common", "configs", "server"):
        shutil.copytree(REPOSITORY / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    project = (
        (REPOSITORY / "pyproject.toml")
        .read_text()
        .replace('clientapp = "fedsgcg.clients.app:app"', 'clientapp = "fedsgcg.clients.echo:app"')
    )
    (app / "pyproject.toml").write_text(project)
    for name in ("README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, app / name)
    source = textwrap.dedent(inspect.getsource(_echo_app))
    head = f"from __future__ import annotations\nfrom typing import Any\nSITES = {SITES!r}\n"
    (app / "clients/echo.py").write_text(f"{head}\n{source}\napp = _echo_app()\n")


def _approve(app: Path, kit: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    from fedsgcg.clients.guard.approval import approve, read_bundle

    approve(read_bundle(build_fab_from_disk(app)), kit / "home/approved.json", "bench")


def _messages(folder: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the seconds of a message with a new and with a warm process: median and quartiles."""
    from flwr.app import Context, Message, Metadata, RecordDict
    from flwr.cli.build import build_fab_from_disk

    from fedsgcg.clients.guard.site_file import read_site_file
    from fedsgcg.common.networks import build_network
    from fedsgcg.common.settings.plan import NetworkSettings
    from fedsgcg.common.wire.messages import Request, encode_request
    from fedsgcg.common.wire.payload import Identity, Weights
    from fedsgcg.deploy.site.resident import Resident
    from tests.support.loopback import Loopback, certificate

    folder.mkdir()
    certificate(folder, "authority")
    kit = Loopback(folder).kit("A", folder)
    _write_ours(folder / "app")
    _approve(folder / "app", kit)
    fab = build_fab_from_disk(folder / "app")
    state = build_network(NetworkSettings(), 3, 2, generator_seed=0).state_dict()
    weights = Weights.from_state({name: tensor.numpy() for name, tensor in state.items()})
    content = encode_request(Request(Identity("run", "", 1, "f" * 64), weights))
    made: Any = Message
    taken: dict[bool, list[float]] = {}
    for cold in (True, False):
        resident = Resident(read_site_file(kit), "127.0.0.1:1", b"secret", cold=cold)
        taken[cold] = []
        for number in range(MESSAGES + 1):
            metadata = Metadata(1, str(number), 0, 1, "", "", time.time(), 600.0, "train")
            context = Context(
                run_id=1, node_id=1, node_config={"site": "A"}, state=RecordDict(), run_config={}
            )
            started = time.perf_counter()
            reply, _ = resident._answer(made(content, metadata=metadata), context, fab, 1)
            if "weights" not in reply.content:
                raise RuntimeError("the echo app did not answer")
            if number:  # the first message fills the caches
                taken[cold].append(time.perf_counter() - started)
        resident._end_worker()
    spreads = [statistics.quantiles(taken[cold], n=4, method="inclusive") for cold in (True, False)]
    cold_s, warm_s = ((spread[1], spread[0], spread[2]) for spread in spreads)
    return cold_s, warm_s


if __name__ == "__main__":
    run()
