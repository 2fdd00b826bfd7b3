"""The executor: starts one process for each run of the coordinator's server.

It replaces Flower's `flower-superexec`, whose subprocess executor puts the token of a run on the
command line of `flwr-serverapp`. Every user of the machine can read a command line, and with the
token call the Runtime API: read the model, send messages to hospitals in the run's name. Here the
token is in an anonymous file that only the new process can open, named by `--token-file`.

Only the coordinator's own part of a run is started; other kinds of tasks are not acquired.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

LOG = logging.getLogger("fedsgcg.executor")
ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
POLL_S: Final = 1.0
PROGRAM: Final = "flwr-serverapp"


def executor_command(address: str, ca: Path | None, secret: Path) -> list[str]:
    """Return the command line of the executor of this process.

    Args:
        address: host:port of the Runtime API.
        ca: Certificate of the authority; None without TLS.
        secret: File with the secret that acquires tasks.
    """
    arguments = (address, str(ca or ""), str(secret), str(os.getpid()))
    # -P: not from the working directory.
    return [sys.executable, "-P", "-m", "fedsgcg.deploy.coordinator.executor", *arguments]


def start_app(address: str, ca: str, token: str) -> subprocess.Popen[bytes]:
    """Start Flower's process for a run; its token is in none of its arguments or variables.

    Args:
        address: host:port of the Runtime API.
        ca: Certificate of the authority; "" without TLS.
        token: The run's token.
    """
    descriptor = os.memfd_create("token", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, token.encode())
        command = [
            str(Path(sys.executable).with_name(PROGRAM)),
            *("--runtime-api-address", address),
            *("--token-file", f"/proc/self/fd/{descriptor}"),
            *(("--root-certificates", ca) if ca else ("--insecure",)),
            *("--parent-pid", str(os.getpid())),
        ]
        return subprocess.Popen(  # noqa: S603 - Flower's own program
            command, pass_fds=[descriptor], stdin=subprocess.DEVNULL
        )
    finally:
        os.close(descriptor)


def main() -> int:
    """Start a process for each run until the server's process (the last argument) ends."""
    address, ca, secret, parent = sys.argv[1:5]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    start_parent_process_monitor(int(parent))
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=not ca,
        root_certificates=Path(ca).read_bytes() if ca else None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=Path(secret).read_bytes(), protected_methods=[ACQUIRE]
            ),
        ],
    )
    with suppress(KeyboardInterrupt):  # the server has ended
        _start_runs(client, address, ca)
    return 0


def _start_runs(client: RuntimeHttpClient, address: str, ca: str) -> NoReturn:
    request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    running: list[subprocess.Popen[bytes]] = []
    while True:
        running = [child for child in running if child.poll() is None]
        try:
            task = client.AcquireTask(request)
            if task.HasField("task") and task.token:
                running.append(start_app(address, ca, task.token))
                LOG.info("run %s: process %d", task.task.run_id, running[-1].pid)
        # Without an executor no run starts any more, so it goes on after any failure.
        except Exception as error:
            LOG.warning("no run could be started: %s", error)
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
