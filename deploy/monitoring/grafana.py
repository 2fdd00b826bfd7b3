"""Puts the dashboards and alert rules into a Grafana server, through grafana-client.

Everything has a stable uid, so that a second push updates what the first one made, and `remove`
removes nothing else. Nothing here runs during a training: dashboards are pushed once, and Grafana
reads Prometheus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.names import number_of
from fedsgcg.common.run_folder import paths
from fedsgcg.deploy.monitoring.dashboards import (
    ALERTS,
    DASHBOARDS,
    FEDERATION,
    FOLDER_TITLE,
    FOLDER_UID,
    OLDEST,
    RULE_GROUP,
    SOURCE_UID,
    data_source,
    rule_json,
    stored_dashboards,
)

if TYPE_CHECKING:
    from grafana_client import GrafanaApi

TIMEOUT_S: Final = 15.0
NOT_FOUND: Final = 404
MARKED: Final = {
    "round.done": "round {round} done",
    "round.void": "round {round} void: {code}",
    "round.screened": "{site}: {code}",
    "site.paused": "{site} paused: {code}",
    "run.started": "started or resumed after round {round}",
    "run.finished": "ended: {status}",
}
"""Event -> text of its annotation; rejected replies are marked too."""

MOST_MARKS: Final = 5000
RIGHTS: Final = "a service account with the role Editor, and for the data source the role Admin"


@dataclass(frozen=True)
class Grafana:
    """A Grafana server.

    Attributes:
        url: Its address.
        api: grafana-client's interface.
    """

    url: str
    api: GrafanaApi


def connected(url: str, token_file: Path, authority: Path | None = None) -> Grafana:
    """Return a server that answers, accepts the token and is recent enough.

    Args:
        url: Address, `http://host:port` or `https://…`, with a path if Grafana has one.
        token_file: File with the token of a service account.
        authority: Certificate of the authority that signed the server's, for https.

    Raises:
        FedsgcgError: CFG-001 for an address that is none, MON-901 without grafana-client, MON-903
            to MON-908 for what the server or the file refuses.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise fail("CFG-001", where="--url", found=url, expected="http://host:3000 or https://…")
    token = _token(token_file)
    try:
        from grafana_client import GrafanaApi
    except ImportError as error:
        raise fail(
            "MON-901",
            found="no grafana-client",
            expected="the extra `monitoring`",
            action="pip install 'fedsgcg[monitoring]', best in an environment of its own",
        ) from error
    if authority is not None and not authority.is_file():
        raise fail("CFG-001", where="--ca", found=f"no file {authority}", expected="a certificate")
    grafana = Grafana(
        url,
        GrafanaApi(
            token,
            host=f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname,
            port=parts.port,
            url_path_prefix=f"{path}/" if (path := parts.path.strip("/")) else "",
            protocol=parts.scheme,
            verify=True if authority is None else str(authority),
            timeout=TIMEOUT_S,
        ),
    )
    with _answers(grafana.url):
        _check_version(grafana.url, grafana.api.health.check())
        grafana.api.folder.get_all_folders()  # the settings are public: this needs the token
    return grafana


def push(grafana: Grafana, prometheus: str, console: Screen) -> int:
    """Create or update the folder, the data source, the dashboards and the alert rules.

    Args:
        grafana: The server.
        prometheus: Address of Prometheus as Grafana reaches it.
        console: For one line each.

    Returns:
        The exit code 0.

    Raises:
        FedsgcgError: MON-903 to MON-907.
    """
    api = grafana.api
    with _answers(grafana.url):
        if _found(api.folder.get_folder, FOLDER_UID) is None:
            api.folder.create_folder(FOLDER_TITLE, uid=FOLDER_UID)
        source = data_source(prometheus)
        if _found(api.datasource.get_datasource_by_uid, SOURCE_UID) is None:
            api.datasource.create_datasource(source)
        else:
            api.datasource.update_datasource_by_uid(SOURCE_UID, source)
        console.print(f"data source: {source['name']}, {prometheus}")
        for tree in stored_dashboards():
            body = {"dashboard": tree, "folderUid": FOLDER_UID, "overwrite": True}
            api.dashboard.update_dashboard(body)
            console.print(f"dashboard:   {grafana.url.rstrip('/')}/d/{tree['uid']}")
            console.event("dashboard.pushed", uid=tree["uid"], title=tree["title"])
        rules = [rule_json(alert) for alert in ALERTS]
        group = {"title": RULE_GROUP, "folderUid": FOLDER_UID, "interval": 60, "rules": rules}
        api.alertingprovisioning.update_rule_group(
            FOLDER_UID, RULE_GROUP, group, disable_provenance=True
        )
        console.print(f"alerts:      {number_of(len(rules), 'rule')} in the folder {FOLDER_TITLE}")
    return 0


def list_all(grafana: Grafana, console: Screen) -> int:
    """Print what of `push` is on the server.

    Returns:
        The exit code: 0 if everything is there, 1 if something is missing.
    """
    api = grafana.api
    with _answers(grafana.url):
        found = {
            f"dashboard {dashboard.title}": _found(api.dashboard.get_dashboard, dashboard.uid)
            for dashboard in DASHBOARDS
        }
        found["data source"] = _found(api.datasource.get_datasource_by_uid, SOURCE_UID)
        found |= {
            f"alert {alert.title}": _found(api.alertingprovisioning.get_alertrule, alert.uid)
            for alert in ALERTS
        }
    for name, there in found.items():
        console.print(f"{name}: {'missing' if there is None else 'there'}")
        console.event("dashboards.listed", object=name, there=there is not None)
    return 1 if None in found.values() else 0


def remove_all(grafana: Grafana, console: Screen) -> int:
    """Remove what `push` made: alert rules, dashboards and data source; the folder if it is empty.

    Returns:
        The exit code 0.
    """
    api = grafana.api
    removed = 0
    with _answers(grafana.url):
        for alert in ALERTS:
            removed += _found(api.alertingprovisioning.delete_alertrule, alert.uid) is not None
        for dashboard in DASHBOARDS:
            removed += _found(api.dashboard.delete_dashboard, dashboard.uid) is not None
        removed += _found(api.datasource.delete_datasource_by_uid, SOURCE_UID) is not None
        if _found(api.folder.get_folder, FOLDER_UID) is not None and not _in_folder(api):
            api.folder.delete_folder(FOLDER_UID)
    console.print(f"{number_of(removed, 'object')} removed")
    console.event("dashboards.removed", count=removed)
    return 0


def annotate(grafana: Grafana, folder: Path, console: Screen) -> int:
    """Mark the events of a run folder on the dashboard *Federation*; each is marked once.

    Returns:
        The exit code 0.

    Raises:
        FedsgcgError: CFG-001 for a folder without event logs, MON-903 to MON-907.
    """
    logs = sorted(folder.rglob(paths.EVENTS)) if folder.is_dir() else []
    if not logs:
        raise fail("CFG-001", where=str(folder), found="no events.jsonl", expected="a run folder")
    api = grafana.api
    made = 0
    with _answers(grafana.url):
        known = {
            tag
            for mark in api.annotations.find_annotations(tags=["fedsgcg"], limit=MOST_MARKS)
            for tag in mark.get("tags", ())
        }
        for log in logs:
            for event, text in _marks(log):
                identity = f"id:{_digest(event)}"
                if identity not in known:
                    moment = int(float(event["time"]) * 1000)
                    api.annotations.add_annotation(
                        dashboard_uid=FEDERATION.uid,
                        time_from=moment,
                        time_to=moment,
                        tags=["fedsgcg", str(event["event"]), identity],
                        text=text,
                    )
                    made += 1
    console.print(f"{number_of(made, 'annotation')} added")
    console.event("dashboards.annotated", count=made)
    return 0


def _marks(log: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the events that are marked, with their texts."""
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
            name = event["event"]
            rejected = name == "round.reply" and not event["accepted"]
            pattern = "{site} rejected: {code}" if rejected else MARKED.get(name, "")
            cell = "{method} · {heldout} · {seed}"
            if pattern:
                yield event, f"{pattern} ({cell})".format(**event)
        except (ValueError, KeyError, TypeError):
            continue  # a line that is still being written


def _digest(event: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(event, sort_keys=True).encode()).hexdigest()[:16]


def _in_folder(api: GrafanaApi) -> bool:
    """Whether somebody else has put something into the folder."""
    found: list[Any] = api.search.search_dashboards(folder_uids=[FOLDER_UID], type_="dash-db")
    return bool(found)


def _found(ask: Any, uid: str) -> Any:
    """Return an answer, None for one that says that there is no such object."""
    from grafana_client.client import GrafanaClientError

    try:
        answer = ask(uid)
    except GrafanaClientError as error:
        if error.status_code == NOT_FOUND:
            return None
        raise
    return "" if answer is None else answer


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "bytes that are no text"
        raise fail(
            "MON-908", where=str(path), found=found, expected="a file with a token"
        ) from error
    if not token or len(token.split()) > 1 or not token.isascii():
        found = "nothing" if not token else "more than a token"
        raise fail("MON-908", where=str(path), found=found, expected="one line with the token")
    return token


def _check_version(url: str, facts: Any) -> None:
    """Raise MON-906 for an old server, MON-907 for something that is not Grafana."""
    version = str(facts.get("version", "")) if isinstance(facts, dict) else ""
    numbers = version.partition("-")[0].split(".")
    wanted = ".".join(str(number) for number in OLDEST)
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers[:2]):
        raise fail("MON-907", where=url, found="no Grafana", expected=f"Grafana {wanted} or later")
    if tuple(int(number) for number in numbers[:2]) < OLDEST:
        raise fail(
            "MON-906",
            where=url,
            found=f"Grafana {version}",
            expected=f"{wanted} or later",
            action="mount the files of deploy/monitoring/grafana instead, or update Grafana",
        )


@contextmanager
def _answers(url: str) -> Iterator[None]:
    """Turn what grafana-client raises into MON-903 to MON-907."""
    from grafana_client.client import GrafanaException, GrafanaTimeoutError
    from niquests.exceptions import RequestException, SSLError

    try:
        yield
    except FedsgcgError:
        raise
    except GrafanaTimeoutError as error:
        found = f"no answer within {TIMEOUT_S:.0f} s"
        raise fail("MON-903", where=url, found=found, expected="a Grafana server") from error
    except GrafanaException as error:
        raise _refused(url, error) from error
    except SSLError as error:
        raise fail(
            "MON-903",
            where=url,
            found=_short(error),
            expected="a certificate that this machine trusts",
            action="give the certificate of its authority with --ca FILE",
        ) from error
    except (RequestException, OSError, ValueError) as error:
        raise fail(
            "MON-903",
            where=url,
            found=_short(error),
            expected="a Grafana server",
            action="check the address, the port and http or https",
        ) from error


def _refused(url: str, error: Any) -> FedsgcgError:
    """Return the error for an answer with a status of 400 or more."""
    found = f"status {error.status_code}: {_short(error)}"
    if error.status_code == 401:
        action = "make a token of a service account and write it into the file"
        return fail("MON-904", where=url, found=found, expected="a valid token", action=action)
    if error.status_code == 403:
        return fail("MON-905", where=url, found=found, expected=RIGHTS)
    if error.status_code == NOT_FOUND:
        expected = f"Grafana {'.'.join(map(str, OLDEST))} or later at this path"
        return fail("MON-906", where=url, found=found, expected=expected)
    return fail("MON-907", where=url, found=found, expected="a server that accepts the dashboards")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
