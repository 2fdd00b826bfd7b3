"""The resident: takes the SuperNode's tasks and passes approved ones to a warm worker.

It replaces Flower's SuperExec (`flower-supernode --isolation process`): it acquires a task, pulls
its message, passes it to `deploy.site.worker` and pushes the reply. The SuperNode always gets a
reply: an error code if the bundle is not approved, the deadline has passed or the worker died. A
killed training therefore never leaves the SuperNode waiting, and the coordinator knows within a
second instead of Flower's minute.

The Flower functions used here are private; `tests/contracts/test_resident_contract.py` checks that
they exist.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedsgcg.clients.guard.approval import (
    Bundle,
    bundle_store,
    keep,
    read_bundle,
    remove_old_refused,
    require_approved,
    require_software,
    unpack,
)
from fedsgcg.clients.guard.egress import identity_of, log_exception, release_error
from fedsgcg.clients.guard.site_file import SiteFile, read_site_file
from fedsgcg.clients.guard.software import Software
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.deploy.isolated import BYTECODE_FREE
from fedsgcg.deploy.site.commands import ALIVE
from fedsgcg.deploy.site.worker import receive_frame, send_frame

LOG = logging.getLogger("fedsgcg.site")
WORKER = Path(__file__).with_name("worker.py")
POLL_S = 0.1
HEARTBEAT_S = 10.0
STARTED_S = 120.0
"""Longest time in which a new worker must have imported its libraries."""

ENDED_S = 10.0
"""Longest wait for a process that was killed or has closed its socket."""

MOST_DEADLINE_S = 7 * 86_400.0
"""Longest deadline of a message, whatever lifetime the coordinator gave it."""

WAITING_S = 120.0
"""Longest silence of a resident that waits for a task or for its worker; longer is a hang."""

TRANSFER_S = 3600.0
"""Longest transfer of a message between SuperNode and resident, both on this machine."""

UNREACHABLE_S = 30.0
"""Time without the SuperNode's runtime API until the resident ends; `join` then restarts both."""

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class StoppedError(Exception):
    """The resident was stopped while a worker was working."""


@dataclass
class Worker:
    """A worker process and the socket to it.

    Attributes:
        process: The process, leader of its own process group.
        link: The resident's end of the socket.
        digest: Digest of the loaded bundle, "" before one is loaded.
        messages: Number of messages answered.
    """

    process: subprocess.Popen[bytes]
    link: socket.socket
    digest: str = ""
    messages: int = 0

    @classmethod
    def start(cls) -> Worker:
        """Start a worker; it imports its libraries in the background."""
        own_end, worker_end = socket.socketpair()
        with worker_end:
            descriptor = worker_end.fileno()
            arguments = (str(WORKER), str(descriptor), str(os.getpid()))
            command = [sys.executable, *BYTECODE_FREE, *arguments]
            process = subprocess.Popen(  # noqa: S603 - own files
                command, pass_fds=[descriptor], start_new_session=True
            )
        return cls(process, own_end)

    def load(self, bundle: Bundle, folder: Path) -> None:
        """Load an approved bundle in the worker.

        Raises:
            EOFError, TimeoutError: The worker died or hangs.
        """
        receive_frame(self.link, time.monotonic() + STARTED_S)
        self.link.settimeout(STARTED_S)
        files = {name: sha256(content).hexdigest() for name, content in bundle.code.items()}
        facts = {"folder": str(folder), "files": files, "app": bundle.client_app}
        send_frame(self.link, json.dumps(facts).encode())
        self.digest = bundle.digest

    def answer(
        self,
        message: Message,
        context: Context,
        task: int,
        deadline_s: float,
        stop: Callable[[], bool],
    ) -> tuple[Message, Context]:
        """Send one message to the worker and return its reply and context.

        Raises:
            TimeoutError: The deadline has passed.
            EOFError, OSError: The process died.
            StoppedError: `stop` returned true.
        """
        self.link.settimeout(max(deadline_s, 1.0))
        send_frame(self.link, json.dumps([task, context.run_id, context.node_id]).encode())
        send_frame(self.link, message_to_proto(message).SerializeToString())
        send_frame(self.link, context_to_proto(context).SerializeToString())
        end = time.monotonic() + deadline_s
        while not select.select([self.link], [], [], POLL_S)[0]:
            if stop():
                raise StoppedError
            if time.monotonic() >= end:
                raise TimeoutError
        end = max(end, time.monotonic() + ENDED_S)  # the reply is ready and only has to be copied
        reply = message_from_proto(ProtoMessage.FromString(receive_frame(self.link, end)))
        after = context_from_proto(ProtoContext.FromString(receive_frame(self.link, end)))
        self.messages += 1
        return reply, after

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self.process.poll() is None

    def end(self) -> None:
        """End the process and everything it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.exit_code() is None:  # it waits for a disk or device, and ends when that answers
            LOG.error("worker %d was killed and has not ended", self.process.pid)
        self.link.close()

    def exit_code(self) -> int | None:
        """Wait for the end of the process; None when it lives on."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(ENDED_S)
        return None


@dataclass
class Resident:
    """The loop over the tasks of one site.

    Args:
        policy: The site's own settings.
        address: host:port of the SuperNode's runtime API.
        secret: Secret required by the SuperNode to acquire a task.
        cold: Start a new worker for each message instead of keeping one warm.
        certificates: PEM of the runtime API's authority; None for loopback without TLS.
        software: The software that this process was started from.
    """

    policy: SiteFile
    address: str
    secret: bytes
    cold: bool = False
    certificates: bytes | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    worker: Worker | None = None
    software: Software = field(default_factory=Software.installed)

    def run(self) -> int:
        """Take tasks until stopped (returns 0) or until the runtime API does not answer (1)."""
        acquiring = self._client(
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=[ACQUIRE])
        )
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        last_seen = time.monotonic()
        self.pulse(WAITING_S)
        if not self.cold:
            self.worker = Worker.start()
        self._write_state(state="waiting")
        try:
            while not self.stopping.is_set():
                self.pulse(WAITING_S)
                try:
                    task = acquiring.AcquireTask(request)
                    last_seen = time.monotonic()
                except httpx.HTTPError as error:
                    if time.monotonic() - last_seen > UNREACHABLE_S:
                        LOG.error(
                            "the SuperNode's runtime API at %s does not answer: %s",
                            self.address,
                            error,
                        )
                        return 1
                    task = None
                if task is not None and task.HasField("task") and task.token:
                    self._do(task.token)
                else:
                    self.stopping.wait(POLL_S)
            return 0
        finally:
            self._end_worker()
            self._write_state(state="ended")
            acquiring.close()

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Take no further task; a running training is ended and answered with SITE-505."""
        self.stopping.set()

    def _do(self, token: str) -> None:
        """Answer the message of one task."""
        client = self._client(RuntimeTokenHttpInterceptor(token))
        done, details = SubStatus.FAILED, "the task was not answered"
        context: Context | None = None
        beating = threading.Event()
        try:
            self.pulse(TRANSFER_S)
            message, context, run, fab = pull_task_input(client)
            threading.Thread(target=_beat, args=(client, beating), daemon=True).start()
            self._write_state(
                state="at work", message=str(message.metadata.message_type), run=str(run.run_id)
            )
            reply, context = self._answer(message, context, fab.content, TaskIdentity.task_id)
            self.pulse(TRANSFER_S)
            push_message(client, reply, context)
            done, details = SubStatus.COMPLETED, ""
        # The SuperNode reports a task without output on its own; the site's log has the cause.
        except Exception:
            LOG.exception("a task could not be answered")
        finally:
            beating.set()
            with suppress(httpx.HTTPError):
                push_task_output(client, context, done, details)
            client.close()
            self._write_state(state="waiting")

    def _answer(
        self, message: Message, context: Context, fab: bytes, task: int
    ) -> tuple[Message, Context]:
        """Return the worker's reply, or a reply with an error code."""
        self.pulse(2 * STARTED_S)
        try:
            bundle = read_bundle(fab)
            approved = Path(self.policy.approved)
            self._require_approved(bundle, approved)
            worker = self._ready(bundle, approved)
            reply, after = worker.answer(
                message, context, task, self.deadline_s(message), self._interrupted
            )
            return _reply_to(message, reply), after
        except FedsgcgError as error:
            return self._refusal(message, error.code, str(error)), context
        except TimeoutError:
            note = f"ended after {self.deadline_s(message):.0f} s"
            return self._refusal(message, "SITE-503", note), context
        except StoppedError:
            return self._refusal(message, "SITE-505", "ended because the site was stopped"), context
        except (EOFError, OSError) as error:
            code = self.worker.exit_code() if self.worker else None
            note = f"the worker ended with {code} (-9: killed, e.g. out of memory)"
            if code is None:
                note = f"the worker does not answer ({type(error).__name__}) and was killed"
            return self._refusal(message, "SITE-504", note), context
        except Exception as error:  # a bundle or a reply of any content must not end the site
            return self._refusal(message, "SITE-500", f"{type(error).__name__}: {error}"), context
        finally:
            if self.cold or self.worker is None or not self.worker.alive:
                self._end_worker()

    def _require_approved(self, bundle: Bundle, approved: Path) -> None:
        """Refuse code that is not approved; keep it, packed, so that it can be compared."""
        try:
            require_approved(bundle, approved)
        except FedsgcgError:
            with suppress(OSError):  # a full disk, or a damaged folder: the code is refused anyway
                keep(bundle, approved)
                remove_old_refused(approved)
            raise

    def _interrupted(self) -> bool:
        """Whether the site is being stopped; called every `POLL_S` while a worker works."""
        self.pulse(WAITING_S)
        return self.stopping.is_set()

    def pulse(self, silence_s: float) -> None:
        """State that the resident is alive and may be silent for so long."""
        until = time.monotonic() + silence_s
        with suppress(OSError):  # only `join` makes the file
            os.utime(Path(self.policy.home) / ALIVE, (until, until))

    def _ready(self, bundle: Bundle, approved: Path) -> Worker:
        """Return a worker that has loaded this bundle: the current one, or a new one.

        Raises:
            FedsgcgError: POL-708 when the installed software is not the approved one, SITE-501 when
                the code cannot be written.
        """
        worker = self.worker
        if worker is None or not worker.alive or worker.digest not in ("", bundle.digest):
            self._end_worker()
            worker = self.worker = Worker.start()
        if not worker.digest:
            self._require_software(approved)
            worker.load(bundle, _unpacked(bundle, bundle_store(approved)))
        return worker

    def _require_software(self, approved: Path) -> None:
        """Check the software on disk, and that it is what this process was started from."""
        now = Software.installed()
        require_software(approved, now)
        if now != self.software:
            raise fail(
                "POL-708",
                found="the software was changed and approved while this node was running",
                expected="a node that runs the approved software",
                action="fedsgcg-site leave KIT, then fedsgcg-site join KIT",
            )

    def _refusal(self, message: Message, code: str, note: str) -> Message:
        """End the worker and return a reply with an error code.

        The note stays in the site's ledger and error log.
        """
        self._end_worker()
        kind = str(message.metadata.message_type)
        identity = identity_of(message.content)
        home = Path(self.policy.home)
        log_exception(home, kind, identity)
        key = Path(self.policy.key)
        content = release_error(code, identity, self.policy.site, home, kind, note, key)
        return Message(content, reply_to=message)

    def deadline_s(self, message: Message) -> float:
        """Return the site's deadline for a message in seconds, else the message's lifetime."""
        return min(self.policy.deadline_s or float(message.metadata.ttl), MOST_DEADLINE_S)

    def _end_worker(self) -> None:
        if self.worker is not None:
            self.worker.end()
            self.worker = None

    def _client(self, interceptor: Any) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.certificates is None,
            root_certificates=self.certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), interceptor],
        )

    def _write_state(self, **facts: str) -> None:
        """Write the current state to the site's folder, for `fedsgcg-site status`."""
        state = {"pid": os.getpid(), "time": time.time(), **facts}
        with suppress(OSError):  # a full disk stops an answer at the ledger, not here
            write_file(Path(self.policy.home) / "resident.json", json.dumps(state).encode())


def _reply_to(message: Message, reply: Message) -> Message:
    """Return the worker's content as a reply to `message`; raises SITE-500 for a Flower error."""
    if reply.has_error():
        raise fail("SITE-500", found="the app returned a Flower error")
    return Message(reply.content, reply_to=message)


def _beat(client: RuntimeHttpClient, done: threading.Event) -> None:
    """Send heartbeats of a task to the SuperNode until `done` is set."""
    while not done.wait(HEARTBEAT_S):
        with suppress(httpx.HTTPError):
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def main() -> int:
    """Run the resident of a site.

    Usage: `deploy.site.resident SITE_FILE ADDRESS SECRET_FILE [cold]`, started isolated.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    policy = read_site_file(Path(sys.argv[1]))
    resident = Resident(
        policy, sys.argv[2], Path(sys.argv[3]).read_bytes(), cold="cold" in sys.argv[4:]
    )
    signal.signal(signal.SIGTERM, resident.stop)
    signal.signal(signal.SIGINT, resident.stop)
    return resident.run()


if __name__ == "__main__":
    sys.exit(main())


def _unpacked(bundle: Bundle, store: Path) -> Path:
    """Return the folder with an approved bundle's code; raises SITE-501 if it cannot be written."""
    try:
        return unpack(bundle, store)
    except OSError as error:
        expected = "a folder with free space"
        raise fail("SITE-501", where=str(store), found=str(error), expected=expected) from error
