"""A real Prometheus, an environment with the real grafana-client, and a stand-in of Grafana."""

import json
import os
import shutil
import site
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedsgcg.deploy.site.commands import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


def prometheus_program(folder: Path) -> str:
    """The program on the PATH, or unpacked from its Debian package.

    Without it the test is skipped with the reason; with FEDSGCG_REQUIRE_PROMETHEUS it fails.
    """
    if found := shutil.which("prometheus"):
        return found
    done = subprocess.run(
        ["sh", "-c", "apt-get download prometheus && dpkg -x prometheus_*.deb ."],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    program = folder / "usr" / "bin" / "prometheus"
    if done.returncode or not program.is_file():
        why = f"no prometheus, and its Debian package cannot be had: {done.stderr[-200:]}"
        if os.environ.get("FEDSGCG_REQUIRE_PROMETHEUS"):
            pytest.fail(why)
        pytest.skip(why)
    return str(program)


class Prometheus:
    """A running Prometheus server that scrapes targets on this machine every second."""

    def __init__(self, address: str) -> None:
        self.address = address

    def query(self, text: str) -> list[dict[str, Any]]:
        """The instant vector of a query."""
        where = f"{self.address}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        try:
            with urllib.request.urlopen(where, timeout=10) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{text}: {error.read().decode()}") from error
        assert found["status"] == "success"
        return list(found["data"]["result"])

    def scrapes(self, targets: int) -> bool:
        """Whether it has tried to scrape all targets, which takes seconds after its start."""
        try:
            with urllib.request.urlopen(f"{self.address}/api/v1/targets", timeout=10) as answer:
                found = json.load(answer)["data"]["activeTargets"]
        except OSError:
            return False
        return len(found) == targets and all(one["health"] != "unknown" for one in found)

    def wait_for(self, text: str, seconds: float = 30) -> list[dict[str, Any]]:
        """The result of a query as soon as it has one."""
        end = time.monotonic() + seconds
        while not (found := self.query(text)):
            assert time.monotonic() < end, f"no data for {text}"
            time.sleep(0.2)
        return found


@contextmanager
def prometheus(folder: Path, *targets: str) -> Iterator[Prometheus]:
    """Run Prometheus on loopback and scrape the targets, `host:port` each."""
    program = prometheus_program(folder)
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "fedsgcg", "static_configs": [{"targets": list(targets)}]}],
    }
    (folder / "prometheus.json").write_text(json.dumps(config))
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'prometheus.json'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "prometheus.log").open("w"),
    )
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        end = time.monotonic() + 60
        while not server.scrapes(len(targets)):
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < end, (folder / "prometheus.log").read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def with_grafana_client(folder: Path) -> str:
    """A Python with grafana-client and everything of this environment.

    grafana-client brings a package that rewrites urllib3 in its environment, which must not be the
    one of the other tests.
    """
    python = folder / "bin" / "python"
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True)
    assert made.returncode == 0, made.stderr
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "-c", str(REPOSITORY / "constraints.txt"), "grafana-client"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    packages = next((folder / "lib").glob("python3*/site-packages"))
    here = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "zz_tests.pth").write_text("\n".join([str(REPOSITORY), *here]) + "\n")
    return str(python)


class GrafanaStandIn:
    """The part of Grafana's HTTP interface that the dashboards use, with its rules and refusals.

    Attributes:
        requests: (method, path, body) of every request.
        version: Version that it states.
        role: Role of the token: Admin, Editor or Viewer.
    """

    TOKEN = "glsa_right"

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.version = "12.1.0"
        self.role = "Admin"
        self.broken = False
        self.folders: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.rules: dict[str, dict[str, Any]] = {}
        self.annotations: list[dict[str, Any]] = []

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
        """(status, body) of a request with a valid token."""
        kind, _, rest = path.strip("/").partition("/")
        writes = method != "GET"
        if self.broken:
            return 502, {"message": "Bad gateway"}
        needs = "Admin" if kind == "datasources" else "Editor"
        if writes and self.role != "Admin" and self.role != needs:
            return 403, {"message": "You'll need additional permissions"}
        route = getattr(self, f"_{kind}", None)
        return route(method, rest, query, body) if route else (404, {"message": "Not found"})

    def _folders(self, method: str, rest: str, query: Any, body: Any) -> Any:
        if method == "POST":
            if body["uid"] in self.folders:
                return 412, {"message": "a folder with that uid exists"}
            self.folders[body["uid"]] = body
            return 200, body
        return self._object(self.folders, method, rest)

    def _datasources(self, method: str, rest: str, query: Any, body: Any) -> Any:
        if method == "POST":
            if body["uid"] in self.sources:
                return 409, {"message": "data source with the same name already exists"}
            assert {"name", "type", "access", "url"} <= body.keys()
            self.sources[body["uid"]] = body
            return 200, {"datasource": body}
        uid = rest.removeprefix("uid/")
        if method == "PUT" and uid in self.sources:
            self.sources[uid] = body
            return 200, {"datasource": body}
        return self._object(self.sources, method, uid)

    def _dashboards(self, method: str, rest: str, query: Any, body: Any) -> Any:
        if method == "POST" and rest == "db":
            assert body["folderUid"] in self.folders
            assert body["overwrite"] is True
            uid = body["dashboard"]["uid"]
            self.dashboards[uid] = body
            return 200, {"status": "success", "uid": uid}
        return self._object(self.dashboards, method, rest.removeprefix("uid/"))

    def _v1(self, method: str, rest: str, query: Any, body: Any) -> Any:
        parts = rest.split("/")
        if parts[1] == "folder" and method == "PUT":
            assert parts[2] in self.folders
            assert all(rule["data"][-1]["refId"] == rule["condition"] for rule in body["rules"])
            group = {rule["uid"]: rule for rule in body["rules"]}
            others = {u: r for u, r in self.rules.items() if r["ruleGroup"] != parts[4]}
            self.rules = others | group
            return 200, body
        return self._object(self.rules, method, parts[-1], gone=204)

    def _annotations(self, method: str, rest: str, query: dict[str, list[str]], body: Any) -> Any:
        if method == "POST":
            assert body["dashboardUID"] in self.dashboards
            self.annotations.append(body)
            return 200, {"message": "Annotation added"}
        tags = set(query.get("tags", []))
        return 200, [mark for mark in self.annotations if tags <= set(mark["tags"])]

    def _search(self, method: str, rest: str, query: Any, body: Any) -> Any:
        return 200, [
            {"uid": uid}
            for uid, found in self.dashboards.items()
            if found["folderUid"] == "fedsgcg"
        ]

    def _object(self, store: dict[str, Any], method: str, uid: str, gone: int = 200) -> Any:
        if not uid:
            return 200, list(store.values())
        if uid not in store:
            return 404, {"message": "not found"}
        if method == "DELETE":
            del store[uid]
            return gone, {"message": "deleted"}
        return 200, store[uid]


@contextmanager
def grafana_stand_in() -> Iterator[tuple[str, GrafanaStandIn]]:
    """Run the stand-in on loopback; yield its address and its state."""
    state = GrafanaStandIn()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            parts = urllib.parse.urlsplit(self.path)
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            state.requests.append((self.command, parts.path, body))
            if parts.path == "/api/frontend/settings":
                self.reply(200, {"buildInfo": {"version": state.version}})
            elif self.headers.get("Authorization") != f"Bearer {state.TOKEN}":
                self.reply(401, {"message": "Invalid API key"})
            else:
                path = parts.path.removeprefix("/api")
                query = urllib.parse.parse_qs(parts.query)
                self.reply(*state.answer(self.command, path, query, body))

        do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

        def reply(self, status: int, body: Any) -> None:
            data = b"" if status == 204 else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()


def environment() -> dict[str, str]:
    """The variables of a command in the environment with grafana-client."""
    return {**os.environ, "PYTHONNOUSERSITE": "1"}
