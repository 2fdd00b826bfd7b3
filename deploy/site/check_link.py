"""Checks of the link to the coordinator, in order, so that the first fault is the one reported."""

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

from fedsgcg.clients.guard.site_file import SiteFile, split_address
from fedsgcg.deploy.site.findings import Finding, Verdict

TIMEOUT_S = 10.0
PROBES = 5
PROBE_BYTES = 2**16
MOST_AHEAD_S = 5.0
MOST_BEHIND_S = 305.0
"""Flower 1.41 rejects a signed request from more than 5 s in the future or 305 s in the past."""

WARN_SKEW_S = 2.0
"""Clock difference above which the check warns."""

DATE_IS_LATE_S = 1.0
"""Average error of the Date header: it has full seconds, and the server updates it every second."""

FASTEST = 1e8
"""Bytes per second above which the probe measures the machine and not the link."""

EXPIRES_SOON_DAYS = 30
PATIENT_S = 60.0
"""Transfer time of a round's payload in one direction above which a slow link gives a warning."""


def examine_link(policy: SiteFile, payload: int) -> list[Finding]:
    """Check name, port, certificate, round trip, clock and speed; stops at the first failure.

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
        raise AssertionError("SiteFile rejects a server without a port")
    host, port = address
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        action = "Check `server` in site.yaml and this machine's DNS."
        yield Finding("link", "name", "fail", f"{host}: {error}", action, "SITE-506")
        return
    addresses = sorted({str(entry[4][0]) for entry in entries})
    yield Finding("link", "name", "ok", f"{host} is {', '.join(addresses)}")
    start = time.perf_counter()
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError as error:
        action = (
            "Check that the coordinator's server is running and that the firewall allows "
            f"outgoing connections to port {port}."
        )
        yield Finding("link", "port", "fail", f"{host}:{port}: {error}", action, "SITE-506")
        return
    milliseconds = 1000 * (time.perf_counter() - start)
    yield Finding("link", "port", "ok", f"{port} is open ({milliseconds:.0f} ms)")
    yield from _secured(policy, host, port, payload)


def _secured(policy: SiteFile, host: str, port: int, payload: int) -> Iterator[Finding]:
    """Check certificate, round trip, clock and speed over a verified TLS connection."""
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
            "link", "certificate", "fail", error.verify_message, _advice(error), "SITE-506"
        )
        return
    except OSError as error:
        action = "The port answers, but not with TLS. Check that it is the coordinator's server."
        yield Finding("link", "certificate", "fail", str(error), action, "SITE-506")
        return
    try:
        yield _expiry(connection.sock)
        yield from _timings(connection, payload)
    except (OSError, http.client.HTTPException) as error:
        action = "The server closes the connection. See its log, or try again."
        yield Finding(
            "link", "answers", "fail", f"{type(error).__name__}: {error}", action, "SITE-506"
        )
    finally:
        connection.close()


def _advice(error: ssl.SSLCertVerificationError) -> str:
    """Return what to do about a certificate that cannot be verified."""
    message = error.verify_message.casefold()
    if "expired" in message:
        return (
            "Check this machine's date. If it is right, ask the coordinator to renew the "
            "certificate: fedsgcg provision --renew."
        )
    if "not yet valid" in message:
        return "Set this machine's clock."
    if "hostname" in message or "ip address" in message:
        return (
            "Set `server` in site.yaml to a name in the certificate, "
            "or ask the coordinator to add this name."
        )
    return (
        "This server does not belong to the kit's coordinator, or ca.crt is out of date. "
        "Compare its fingerprint over the phone."
    )


def _expiry(sock: object) -> Finding:
    if not isinstance(sock, ssl.SSLSocket):
        raise AssertionError("an HTTPS connection has a TLS socket")
    facts = sock.getpeercert() or {}
    days = (ssl.cert_time_to_seconds(str(facts.get("notAfter"))) - time.time()) / 86400
    found = f"trusted, {sock.version()}, {days:.0f} days left"
    if days < EXPIRES_SOON_DAYS:
        action = (
            "Ask the coordinator to renew it: fedsgcg provision --renew. "
            "Nothing changes at this site."
        )
        return Finding("link", "certificate", "warn", found, action, "SITE-516")
    return Finding("link", "certificate", "ok", found)


def _timings(connection: http.client.HTTPSConnection, payload: int) -> Iterator[Finding]:
    """Measure round trip, clock and speed over one persistent connection."""
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
    rate = "more than 100 MB/s" if speed > FASTEST else f"about {speed / 1e6:.2g} MB/s"
    found = (
        f"{rate} upload; {payload / 1e6:.1f} MB per round and direction: {max(seconds, 0.1):.1f} s"
    )
    if seconds > PATIENT_S:
        action = (
            "Use a faster link, or ask for a smaller network (network.base_width) "
            "and a longer round deadline."
        )
        yield Finding("link", "speed", "warn", found, action, "SITE-506")
    else:
        yield Finding("link", "speed", "ok", found)


def _clock(skews: list[float]) -> Finding:
    if not skews:
        return Finding(
            "clock",
            "difference",
            "warn",
            "the server's answers contain no time",
            "Compare both clocks by hand.",
            "SITE-515",
        )
    skew = statistics.median(skews)
    if abs(skew) <= WARN_SKEW_S:
        return Finding("clock", "difference", "ok", "less than 2 s")
    side = "ahead of" if skew > 0 else "behind"
    found = f"{abs(skew):.0f} s {side} the coordinator's"
    action = "Switch on time synchronisation (NTP): signed requests with a wrong time are rejected."
    verdict: Verdict = "fail" if skew > MOST_AHEAD_S or skew < -MOST_BEHIND_S else "warn"
    return Finding("clock", "difference", verdict, found, action, "SITE-515")


def _ask(connection: http.client.HTTPSConnection, body: bytes) -> tuple[float, float | None]:
    """Send a request that needs no permission and changes nothing.

    Returns:
        Duration in seconds, and the server's time in seconds since 1970 (None if not given).
    """
    start = time.perf_counter()
    connection.request("POST", "/", body=body, headers={"Content-Type": "application/octet-stream"})
    with suppress(AttributeError):
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answer = connection.getresponse()
    answer.read()
    seconds = time.perf_counter() - start
    date = answer.headers["Date"]
    if not date:
        return seconds, None
    return seconds, email.utils.parsedate_to_datetime(date).timestamp()
