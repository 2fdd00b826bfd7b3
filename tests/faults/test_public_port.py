"""The public port of the coordinator: strangers can neither fill its memory nor its descriptors."""

import asyncio
import contextlib
import datetime
import logging
import resource
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.date import now

from fedsgcg.deploy.coordinator.front import (
    OBJECTS,
    PULLED,
    BoundedBodies,
    Limits,
    signed_by,
)
from fedsgcg.deploy.coordinator.noise import MOST, MOST_CHARACTERS, PERIOD_S, NoiseLimit
from fedsgcg.deploy.coordinator.public_server import (
    PublicServer,
    public_server,
    raise_descriptors,
)
from fedsgcg.deploy.site.commands import free_port
from tests.support.loopback import certificate

SMALL = Limits(
    address=4,
    connections=6,
    handshake_s=1.0,
    head_s=1.0,
    head_bytes=4096,
    idle_s=1.0,
    body_s=30.0,
    stranger_bytes=1000,
    at_once=2,
    bodies={OBJECTS: 10**6},
)
RESPONSE = 32 * 2**20
PART = 2**16
KEY = ec.generate_private_key(ec.SECP384R1())
PUBLIC = KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


def signature(key: ec.EllipticCurvePrivateKey = KEY, age_s: float = 0.0) -> dict[str, str]:
    """Headers of a SuperNode's request."""
    stamp = (now() - datetime.timedelta(seconds=age_s)).isoformat()
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signed = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-signature": b64encode(signed).decode(),
        "flwr-timestamp": stamp,
    }


@dataclass
class Served:
    """A running server and the bytes that its application received."""

    port: int
    trust: ssl.SSLContext
    received: list[int] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    server: PublicServer | None = None

    async def app(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Read a body as Flower does, and answer with its length, or at length (`PULLED`)."""
        size, more = 0, True
        while more:
            event = await receive()
            size += len(event.get("body", b""))
            self.received.append(size)
            more = event.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == PULLED:
            for _ in range(RESPONSE // PART):
                part = {"type": "http.response.body", "body": b"x" * PART, "more_body": True}
                await send(part)
            self.gone.set()
        await send({"type": "http.response.body", "body": str(size).encode()})

    def server_is_idle(self) -> None:
        """Wait until no request is in progress."""
        while self.server is not None and self.server.server_state.tasks:
            time.sleep(0.01)

    def connect(self, secure: bool = True, source: str = "127.0.0.1") -> socket.socket:
        """Connect, with or without the TLS handshake."""
        link = socket.create_connection(("127.0.0.1", self.port), 30, (source, 0))
        return self.trust.wrap_socket(link, server_hostname="127.0.0.1") if secure else link

    def ask(self, head: str, body: bytes = b"", **headers: str) -> int:
        """Send a request; return the status."""
        with self.connect() as link:
            send(link, head, body, **headers)
            return status(link)


def send(link: socket.socket, head: str, body: bytes = b"", **headers: str) -> None:
    lines = [f"POST {head} HTTP/1.1", "host: x"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    link.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def status(link: socket.socket) -> int:
    """Read a whole answer."""
    answer = HTTPResponse(link)
    answer.begin()
    answer.read()
    return answer.status


def is_closed(link: socket.socket) -> bool:
    """Whether the other end closes the connection within the test's patience."""
    try:
        return link.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("front")
    certificate(folder, "server", certificate(folder, "ca"))
    trust = ssl.create_default_context(cafile=folder / "ca.crt")
    made = Served(free_port(), trust)
    tls = {
        "ssl_certfile": str(folder / "server.crt"),
        "ssl_keyfile": str(folder / "server.key"),
    }
    app = BoundedBodies(made.app, SMALL, lambda key: key == PUBLIC)
    made.server = public_server(app, "127.0.0.1", made.port, SMALL, tls)
    thread = threading.Thread(target=lambda: asyncio.run(made.server.serve()))
    thread.start()
    while not made.server.started:
        pass
    yield made
    made.server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.attack("anonymous-bodies")
def test_row_40_a_long_anonymous_body_is_refused_by_its_head(served: Served) -> None:
    """Row 40: 400 MB were buffered before anybody was authenticated."""
    served.received.clear()
    assert served.ask(OBJECTS, content_length=str(400 * 2**20)) == 413
    assert served.ask("/other", content_length="1001") == 413
    assert served.ask(OBJECTS, content_length="9" * 30) in (400, 413)
    assert served.received == []


@pytest.mark.attack("anonymous-bodies")
def test_row_40_a_body_without_length_is_cut_at_the_limit(served: Served) -> None:
    """Row 40: chunked bodies state no length."""
    served.received.clear()
    chunk = b"1f4\r\n" + b"x" * 500 + b"\r\n"
    assert served.ask(OBJECTS, chunk * 50, transfer_encoding="chunked") == 413
    assert max(served.received, default=0) <= 1000


def test_a_short_body_of_anybody_and_a_long_one_of_a_hospital_arrive(served: Served) -> None:
    assert served.ask("/any", b"x" * 1000, content_length="1000") == 200
    for number in (1001, 10**6):
        body = b"x" * number
        assert served.ask(OBJECTS, body, content_length=str(number), **signature()) == 200
    assert served.ask(OBJECTS, content_length=str(10**6 + 1), **signature()) == 413
    assert served.ask("/other", content_length="1001", **signature()) == 413


def test_a_signature_must_be_fresh_and_of_a_registered_key() -> None:
    def known(headers: dict[str, str]) -> bool:
        raw = {name: value.encode() for name, value in headers.items()}
        return signed_by(raw, lambda key: key == PUBLIC)

    assert known(signature())
    assert not known(signature(age_s=3600))
    assert not known(signature(age_s=-3600))
    assert not known(signature(ec.generate_private_key(ec.SECP384R1())))
    mixed = signature(ec.generate_private_key(ec.SECP384R1()))
    assert not known(mixed | {"flwr-public-key": signature()["flwr-public-key"]})
    for name in signature():
        assert not known({key: value for key, value in signature().items() if key != name})
        assert not known(signature() | {name: "\xff\xfe"})


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nhost:"])
@pytest.mark.attack("idle-connections")
def test_row_i10_a_connection_that_asks_nothing_is_closed(served: Served, sent: bytes) -> None:
    """I10: 990 idle TLS connections took every descriptor, and none was closed after 75 s."""
    with served.connect() as link:
        link.sendall(sent)
        assert is_closed(link)


def test_row_i10_a_handshake_that_does_not_happen_is_closed(served: Served) -> None:
    """I10: a connection counts and ends before TLS, too."""
    with served.connect(secure=False) as link:
        assert is_closed(link)


@pytest.mark.attack("idle-connections")
def test_row_i10_a_head_or_body_that_trickles_is_closed(served: Served) -> None:
    """I10: each byte used to start the waiting anew."""
    with served.connect() as link:
        assert trickle(link)
    with served.connect() as link:
        send(link, "/any", b"x", content_length="900")
        assert status(link) == 408


def trickle(link: socket.socket) -> bool:
    """Send a byte ten times a second; return whether the other end puts an end to it."""
    try:
        for _ in range(200):
            link.sendall(b"x")
            if is_late(link):
                return True
    except (ConnectionError, ssl.SSLError):
        return True
    return False


def is_late(link: socket.socket) -> bool:
    link.settimeout(0.1)
    try:
        return link.recv(1) == b""
    except TimeoutError:
        return False


def test_a_connection_is_closed_after_an_answer_and_used_again_before(served: Served) -> None:
    with served.connect() as link:
        for _ in range(3):
            send(link, "/any", b"abc", content_length="3")
            assert status(link) == 200
        link.settimeout(30)
        assert is_closed(link)


@pytest.mark.attack("unread-responses")
def test_row_i10_a_hospital_that_reads_nothing_of_a_response_is_closed(served: Served) -> None:
    """I10: a registered hospital asked for objects and never read them; nothing ended that."""
    served.gone.clear()
    with served.connect() as link:
        send(link, PULLED, content_length="0", **signature())
        assert served.gone.wait(60)  # the application was released: nobody takes the rest
        taken = 0
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := link.recv(2**20):
                taken += len(data)
        assert taken < RESPONSE


def test_a_slow_reader_gets_all_of_a_response(served: Served) -> None:
    with served.connect() as link:
        send(link, PULLED, content_length="0", **signature())
        size = 0
        while size < RESPONSE:
            data = link.recv(2**16)
            assert data, size
            size += len(data)
            if size % 2**21 < len(data):
                time.sleep(0.2)  # all in all three times the limit between two parts


def test_row_40_a_hospital_has_few_large_requests_at_once(served: Served) -> None:
    """Row 40: one hospital asked for large objects on all connections of its address."""
    with contextlib.ExitStack() as stack:
        for _ in range(SMALL.at_once):
            link = stack.enter_context(served.connect())
            send(link, OBJECTS, b"x", content_length="900", **signature())
            while not served.received or served.received[-1] != 1:
                time.sleep(0.01)
            served.received.clear()
        assert served.ask(OBJECTS, content_length="0", **signature()) == 429
        assert served.ask(OBJECTS, content_length="0") == 200  # somebody else, whom Flower refuses
    served.server_is_idle()
    assert served.ask(OBJECTS, content_length="0", **signature()) == 200


def test_a_long_head_is_refused(served: Served) -> None:
    with served.connect() as link:
        link.sendall(b"POST /any HTTP/1.1\r\nmore: " + b"x" * 10_000)
        assert status(link) == 400


@pytest.mark.attack("idle-connections")
def test_row_i10_connections_are_limited_by_address_and_in_all(served: Served) -> None:
    """I10: a stranger's connections leave room for another address, and all are bounded."""
    first = [served.connect(secure=False) for _ in range(SMALL.address)]
    refused = served.connect(secure=False)
    assert is_closed(refused)
    second = [served.connect(secure=False, source="127.0.0.2") for _ in range(2)]
    with served.connect(secure=False, source="127.0.0.3") as third:
        assert is_closed(third)
    for link in (*first, *second):
        assert is_closed(link)  # at the deadline of the handshake
        link.close()
    refused.close()
    assert served.ask("/any", b"abc", content_length="3") == 200


def test_open_files_are_raised_to_what_is_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert raise_descriptors(1024) == min(1024, hard)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(1024, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def record(text: str, *values: object, name: str = "flwr") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "", 0, text, values, None)


@pytest.mark.attack("log-flood")
def test_row_70_repetitions_do_not_push_the_log_over() -> None:
    """Row 70: a stranger repeats one message; others are still written, and the rest is counted."""
    clock = [0.0]
    limit = NoiseLimit(lambda: clock[0])
    written = [limit.filter(record("bad request of %s", k)) for k in range(1000)]
    assert written == [True] * MOST + [False] * (1000 - MOST)
    assert limit.filter(record("another message"))
    clock[0] = PERIOD_S
    later = record("bad request of %s", 7)
    assert limit.filter(later)
    assert later.getMessage() == (
        f"bad request of 7 ({1000 - MOST} repetitions of earlier messages were left out)"
    )


def test_row_70_texts_of_any_number_and_length_are_bounded() -> None:
    """Row 70: messages whose texts all differ share one count beyond a number of kinds."""
    limit = NoiseLimit(lambda: 0.0)
    assert sum(limit.filter(record(f"{k:040d}")) for k in range(5000)) <= 1000 + MOST
    long = record("%s", "x" * 10**6)
    NoiseLimit(lambda: 0.0).filter(long)
    assert len(long.getMessage()) == MOST_CHARACTERS


def test_the_default_limits_fit_hospitals_behind_one_address() -> None:
    limits = replace(Limits())
    assert limits.bodies[OBJECTS] > 20 * 5_242_880  # a part of an array has at most 5 MiB
    assert limits.address < limits.connections
