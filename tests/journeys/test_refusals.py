"""Refusals and their messages: unknown keys, other authorities, revoked sites, and more."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy import certificates
from fedsgcg.deploy.coordinator.control import Control, control_of
from tests.support.federation import Federation, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FLEET = ("pull-messages", "activate-node", "get-fab")
CLOSED = (
    "control/start-run",
    "control/list-runs",
    "control/register-node",
    "runtime/acquire-task",
    "runtime/get-nodes",
)


@pytest.fixture(scope="module")
def federation(hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A served federation of three hospitals, none of them there."""
    found = Federation(tmp_path_factory.mktemp("federation"), hospitals)
    found.provision(
        ["East", "North", "South"], "method=source", "federation.rounds=1", join_deadline_s=60.0
    )
    found.serve()
    yield found
    found.close()


def ask(federation: Federation, port: int, path: str, **headers: str) -> httpx.Response:
    """Send a request with only the authority's certificate, which every hospital has."""
    verify = str(federation.site("East") / "ca.crt")
    kind = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    address = f"https://127.0.0.1:{port}{path}"
    return httpx.post(address, content=b"", headers={**kind, **headers}, verify=verify, timeout=20)


@pytest.mark.parametrize("path", CLOSED)
def test_the_public_port_knows_no_command_of_the_coordinator(
    federation: Federation, path: str
) -> None:
    for spelling in (
        f"/v1/{path}",
        f"/v1/fleet/../{path}",
        f"//v1/{path}",
        f"/v1/fleet/%2e%2e/{path}",
    ):
        response = ask(federation, federation.port, spelling)
        assert response.status_code == 403, spelling
        assert "only registered hospitals" in response.text


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/"])
def test_the_public_port_shows_nothing(federation: Federation, path: str) -> None:
    assert ask(federation, federation.port, path).status_code == 403


@pytest.mark.parametrize("name", FLEET)
def test_the_public_port_wants_a_hospitals_key(federation: Federation, name: str) -> None:
    assert ask(federation, federation.port, f"/v1/fleet/{name}").status_code == 401


@pytest.mark.parametrize("path", CLOSED)
def test_on_the_coordinators_own_machine_the_credential_is_wanted_too(
    federation: Federation, path: str
) -> None:
    for headers in ({}, {"authorization": "Bearer guess"}, {"authorization": "Basic guess"}):
        assert ask(federation, federation.port + 1, f"/v1/{path}", **headers).status_code in (
            401,
            403,
        )


def test_without_the_credential_no_run_is_started(federation: Federation) -> None:
    ca = (federation.kit.folder / "ca.crt").read_bytes()
    outsider = Control(f"127.0.0.1:{federation.port + 1}", "guess", ca)
    for attempt in (lambda: outsider.start(b"", {}), outsider.nodes, lambda: outsider.stop(1)):
        with pytest.raises(FedsgcgError, match="DEP-611"):
            attempt()
    through_the_front = Control(
        f"127.0.0.1:{federation.port}", federation.kit.token.read_text().strip(), ca
    )
    with pytest.raises(FedsgcgError, match="DEP-611"):
        through_the_front.nodes()


@pytest.mark.row(56)
def test_another_authority_is_not_believed(federation: Federation, tmp_path: Path) -> None:
    certificates.write_authority(tmp_path, certificates.make_authority("stranger"))
    control = Control(
        federation.kit.project().control_address, "any", (tmp_path / "ca.crt").read_bytes()
    )
    with pytest.raises(FedsgcgError, match=r"DEP-610(.|\n)*CERTIFICATE_VERIFY_FAILED"):
        control.nodes()


def test_a_hospital_that_trusts_another_authority_does_not_connect(
    federation: Federation, tmp_path: Path
) -> None:
    certificates.write_authority(tmp_path, certificates.make_authority("stranger"))
    shutil.copy(tmp_path / "ca.crt", federation.site("East") / "ca.crt")
    try:
        done = federation.try_command(
            "join", federation.site("East"), module="fedsgcg.deploy.cli.site"
        )
    finally:
        shutil.copy(federation.kit.folder / "ca.crt", federation.site("East") / "ca.crt")
    assert done.returncode == 2
    assert "SITE-506" in done.stderr
    assert "unable to get local issuer certificate" in done.stderr


@pytest.mark.row(56)
def test_an_unregistered_key_is_not_let_in(federation: Federation, tmp_path: Path) -> None:
    kit = federation.site("North")
    shutil.copytree(kit, tmp_path / "kit")
    for name in ("site.key", "site.pub"):
        (kit / name).unlink()
    certificates.make_site_key(kit, "North")
    try:
        federation.join("North")
        federation.wait(lambda: "SITE-509" in federation.log("North"), 90, "no reason in its log")
        assert "is registered or revoked" in federation.log("North")
        assert not federation.online("North")
    finally:
        federation.kill("North")
        for name in ("site.key", "site.pub"):
            shutil.copy(tmp_path / "kit" / name, kit / name)


@pytest.mark.row(57)
def test_code_that_a_hospital_has_not_approved_does_not_run_there(federation: Federation) -> None:
    (federation.site("South") / "approved.json").unlink()
    federation.join("East", "North", "South")
    federation.run()
    assert federation.finish("run", 200) == 1, federation.logs()
    assert "POL-705" in federation.log("run")
    assert "refused: South" in federation.log("run")


@pytest.mark.row(56)
def test_a_revoked_hospital_is_out_at_once_and_stays_out(federation: Federation) -> None:
    if "North" not in federation.processes:
        federation.join("North")
    federation.wait(lambda: federation.online("North"), 60, "North did not join")
    federation.command(
        "provision",
        federation.folder / "project.yaml",
        "-o",
        federation.folder / "kits",
        "--revoke",
        "North",
    )
    federation.wait(
        lambda: "North: unregistered" in federation.log("serve"), 30, "nothing happened"
    )
    with control_of(federation.kit) as control:
        assert {node.status for node in control.nodes() if node.site == "North"} == {"unregistered"}
    federation.wait(lambda: "SITE-509" in federation.log("North"), 120, "the hospital is not told")
    assert (
        "North   not registered" in federation.try_command("status", federation.kit.folder).stdout
    )


@pytest.mark.row(56)
def test_a_server_without_tls_is_for_loopback_only(federation: Federation) -> None:
    for arguments in (
        ("--insecure", "--listen", "0.0.0.0"),
        ("--insecure", "--listen", "192.0.2.7"),
    ):
        done = federation.try_command("serve", federation.kit.folder, *arguments)
        assert done.returncode == 2
        assert "DEP-608" in done.stderr
        assert "leave out --insecure" in done.stderr


@pytest.mark.row(56)
def test_a_certificate_that_has_ended_is_not_served(federation: Federation, tmp_path: Path) -> None:
    kit = tmp_path / "kits"
    shutil.copytree(federation.folder / "kits", kit)
    authority = certificates.read_authority(kit / "coordinator")
    certificates.write_server(
        kit / "coordinator", *certificates.make_server_certificate(authority, ["127.0.0.1"], days=0)
    )
    done = federation.try_command("serve", kit)
    assert done.returncode == 2
    assert "DEP-607" in done.stderr
    assert "--renew" in done.stderr


@pytest.mark.row(51)
def test_a_port_in_use_is_reported(federation: Federation) -> None:
    done = federation.try_command("serve", federation.kit.folder)
    assert done.returncode == 2
    assert "DEP-609" in done.stderr


def test_a_missing_server_is_reported(federation: Federation, tmp_path: Path) -> None:
    text = (
        (federation.folder / "project.yaml")
        .read_text()
        .replace(str(federation.port), str(free_ports(2)))
    )
    (tmp_path / "project.yaml").write_text(text)
    federation.command("provision", tmp_path / "project.yaml", "-o", tmp_path / "kits")
    for command in ("run", "status"):
        done = federation.try_command(command, tmp_path / "kits")
        assert done.returncode == (2 if command == "run" else 1)
        assert "DEP-610" in done.stdout + done.stderr
    for command in ("stop", "resume"):
        done = federation.try_command(command, tmp_path / "kits")
        assert done.returncode == 2
        assert "DEP-613" in done.stderr


@pytest.mark.parametrize("setting", ["data.root=/etc", "site.home=/etc", "site.roles=[train]"])
@pytest.mark.row(58, 59)
def test_what_is_the_hospitals_own_cannot_be_set_by_the_coordinator(
    federation: Federation, setting: str
) -> None:
    done = federation.try_command("run", federation.kit.folder, setting)
    assert done.returncode == 2
    assert "each hospital sets it in its own site.yaml" in done.stderr
