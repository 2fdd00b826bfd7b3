"""The link to the coordinator, step by step, so that the first thing that is wrong is the one that is named."""

from __future__ import annotations

import email.utils
import http.client
import socket
import ssl
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from clients.guard.site_file import SiteFile, split_address
from deploy.site.check_files import Finding

TIMEOUT_S = 10.0
PROBES = 5
PROBE_BYTES = 2**16
MOST_AHEAD_S, MOST_BEHIND_S, WARN_SKEW_S = 5.0, 305.0, 2.0
"""Flower 1.41 refuses a signed request from more than 5 s in the future or 305 s in the past."""

DATE_IS_LATE_S = 1.0
"""By how much the Date header is too low on average: it has whole seconds, and the server makes it once a second."""

FASTEST = 1e8
"""Bytes a second above which the probe measures the machine and not the link."""

EXPIRES_SOON_DAYS = 30
PATIENT_S = 60.0
"""Seconds for one direction of a round's payload above which a slow link is worth a warning."""


def examine_link(policy: SiteFile, payload: int) -> list[Finding]:
    """Look at name, port, certificate, round trip, clock and speed; stops at the first that fails.

    Args:
        policy: The site's settings: server and authority.
        payload: Bytes of one direction of a round.
    """
    findings: list[Finding] = []
    for finding in _steps(policy, payload):
        findings.append(finding)
        if finding.verdict == "fail":
            break
    return findings


def _steps(policy: SiteFile, payload: int) -> Iterator[Finding]:
    address = split_address(policy.server)
    if address is None:
        raise AssertionError("checked when the site file was read")
    host, port = address
    try:
        found = sorted(
            {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        )
    except OSError as error:
        action = "Check the name in server: and this machine's DNS."
        yield Finding("link", "name", "fail", f"{host}: {error}", action, "SITE-506")
        return
    yield Finding("link", "name", "ok", f"{host} is {', '.join(found)}")
    try:
        began = time.perf_counter()
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError as error:
        action = f"Is the coordinator's server running? Does a firewall let port {port} out?"
        yield Finding("link", "port", "fail", f"{host}:{port}: {error}", action, "SITE-506")
        return
    yield Finding(
        "link", "port", "ok", f"{port} is open ({1000 * (time.perf_counter() - began):.0f} ms)"
    )
    yield from _secured(policy, host, port, payload)


def _secured(policy: SiteFile, host: str, port: int, payload: int) -> Iterator[Finding]:
    """Look at what only a connection with a checked certificate shows."""
    try:
        context = ssl.create_default_context(cafile=policy.ca)
    except (OSError, ssl.SSLError) as error:
        action = "Ask the coordinator for ca.crt again."
        yield Finding(
            "link", "authority", "fail", f"{Path(policy.ca).name}: {error}", action, "SITE-506"
        )
        return
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        yield Finding(
            "link", "certificate", "fail", error.verify_message, _repair(error), "SITE-506"
        )
        return
    except OSError as error:
        action = "The port answers, but not with TLS: is this the coordinator's server?"
        yield Finding("link", "certificate", "fail", str(error), action, "SITE-506")
        return
    try:
        yield _expiry(connection.sock)
        yield from _timings(connection, payload)
    except (OSError, http.client.HTTPException) as error:
        action = "The server closes the connection: look at its log, or try again."
        yield Finding(
            "link", "answers", "fail", f"{type(error).__name__}: {error}", action, "SITE-506"
        )
    finally:
        connection.close()


def _repair(error: ssl.SSLCertVerificationError) -> str:
    """What to do about a certificate that does not hold."""
    message = error.verify_message.casefold()
    if "expired" in message:
        return "The coordinator renews the server's certificate: fedsgcg provision --renew. Is this machine's date right?"
    if "not yet valid" in message:
        return "Set this machine's clock."
    if "hostname" in message or "ip address" in message:
        return "server: must be a name that the certificate is for; ask the coordinator to add this one."
    return "This is not the coordinator that the kit came from, or ca.crt is old. Compare its fingerprint by telephone."


def _expiry(sock: object) -> Finding:
    if not isinstance(sock, ssl.SSLSocket):
        raise AssertionError("an HTTPS connection has a TLS socket")
    facts = sock.getpeercert() or {}
    days = (ssl.cert_time_to_seconds(str(facts.get("notAfter"))) - time.time()) / 86400
    words = f"trusted, {sock.version()}, {days:.0f} days left"
    if days < EXPIRES_SOON_DAYS:
        action = "Tell the coordinator: fedsgcg provision --renew. Nothing changes at this site."
        return Finding("link", "certificate", "warn", words, action, "SITE-516")
    return Finding("link", "certificate", "ok", words)


def _timings(connection: http.client.HTTPSConnection, payload: int) -> Iterator[Finding]:
    """Measure round trip, clock and speed over one connection that stays open."""
    trips, skews = [], []
    for _ in range(PROBES):
        sent = time.time()
        seconds, date = _ask(connection, b"")
        trips.append(seconds)
        if date is not None:
            skews.append(sent + seconds / 2 - date - DATE_IS_LATE_S)
    trip = statistics.median(trips)
    yield Finding("link", "round trip", "ok", f"{1000 * trip:.0f} ms")
    yield _clock(skews)
    loaded = statistics.median(_ask(connection, bytes(PROBE_BYTES))[0] for _ in range(PROBES))
    speed = PROBE_BYTES / max(loaded - trip, 1e-4)
    seconds = payload / speed
    told = "more than 100 MB/s" if speed > FASTEST else f"about {speed / 1e6:.2g} MB/s"
    words = f"{told} up; {payload / 1e6:.1f} MB a round and direction: {max(seconds, 0.1):.1f} s"
    if seconds > PATIENT_S:
        action = "Use a faster link, or ask for a smaller network (network.base_width) and a longer round deadline."
        yield Finding("link", "speed", "warn", words, action, "SITE-506")
    else:
        yield Finding("link", "speed", "ok", words)


def _clock(skews: list[float]) -> Finding:
    if not skews:
        return Finding(
            "clock",
            "difference",
            "warn",
            "the server tells no time",
            "Compare both clocks by hand.",
            "SITE-515",
        )
    skew = statistics.median(skews)
    side = "ahead of" if skew > 0 else "behind"
    words = (
        f"{abs(skew):.0f} s {side} the coordinator's"
        if abs(skew) > WARN_SKEW_S
        else "less than 2 s"
    )
    action = "Switch on time synchronisation (NTP): signed requests with a wrong time are refused."
    if skew > MOST_AHEAD_S or skew < -MOST_BEHIND_S:
        return Finding("clock", "difference", "fail", words, action, "SITE-515")
    if abs(skew) > WARN_SKEW_S:
        return Finding("clock", "difference", "warn", words, action, "SITE-515")
    return Finding("clock", "difference", "ok", words)


def _ask(connection: http.client.HTTPSConnection, body: bytes) -> tuple[float, float | None]:
    """Send a request that needs no right and changes nothing; returns its seconds and the server's time."""
    began = time.perf_counter()
    connection.request("POST", "/", body=body, headers={"Content-Type": "application/octet-stream"})
    with suppress(AttributeError):
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answer = connection.getresponse()
    answer.read()
    seconds = time.perf_counter() - began
    date = (
        email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
        if answer.headers["Date"]
        else None
    )
    return seconds, date
