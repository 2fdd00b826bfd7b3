"""Kits: contents, repeated calls, renewal, revocation, keys made at the sites, and secrets."""

import ipaddress
import shutil
import ssl
import stat
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsgcg.clients.guard.site_file import read_site_file
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy import certificates
from fedsgcg.deploy.coordinator.project import Kit, read_project
from fedsgcg.deploy.coordinator.provision import Provisioned, provision

SECRETS = ("ca.key", "server.key", "token", "executor.secret", "site.key")


PASSPHRASE = b"only for tests of this file"


@pytest.fixture(autouse=True)
def passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSGCG_CA_PASSPHRASE", PASSPHRASE.decode())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


def write_project(folder: Path, **changes: object) -> Path:
    tree = {
        "name": "prostate",
        "server": "fed.example.org:8443",
        "sites": ["North", "South", "West"],
        "keys": "issued",
        "limits": {"all": {"patients": 300, "slices": 9000}},
        **changes,
    }
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_kits_hold_what_each_party_needs_and_nothing_of_another(
    project: Path, tmp_path: Path
) -> None:
    done = provision(project, tmp_path / "kits")
    found = set(content(tmp_path / "kits"))
    own = {
        "ca.crt",
        "ca.key",
        "server.crt",
        "server.key",
        "token",
        "executor.secret",
        "project.yaml",
        "README.md",
    }
    own |= {
        "compose.yaml",
        "fedsgcg-coordinator.service",
        *(f"keys/{site}.pub" for site in ("North", "South", "West")),
    }
    kit = {
        "site.yaml",
        "ca.crt",
        "site.key",
        "site.pub",
        "README.md",
        "compose.yaml",
        "fedsgcg-site.service",
        "settings.txt",
    }
    sites = {f"sites/{site}/{name}" for site in ("North", "South", "West") for name in kit}
    assert found == {f"coordinator/{name}" for name in own} | sites
    assert done.kit.project() == read_project(project)


def test_secrets_are_only_their_owners_to_read(project: Path, tmp_path: Path) -> None:
    provision(project, tmp_path / "kits")
    paths = [path for path in (tmp_path / "kits").rglob("*") if path.name in SECRETS]
    assert {path.name for path in paths} == set(SECRETS)
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for folder in ("coordinator", "sites/North"):
        assert stat.S_IMODE((tmp_path / "kits" / folder).stat().st_mode) == 0o700


def test_a_second_call_changes_nothing(project: Path, tmp_path: Path) -> None:
    provision(project, tmp_path / "kits")
    filled_in = tmp_path / "kits/sites/North/site.yaml"
    filled_in.write_text(filled_in.read_text().replace("data_root: ''", "data_root: /data"))
    before = content(tmp_path / "kits")
    again = provision(project, tmp_path / "kits")
    assert content(tmp_path / "kits") == before
    assert (again.made, again.warnings, again.waiting, again.revoked) == ([], [], [], [])


def test_a_site_added_later_gets_its_kit_and_the_others_stay(project: Path, tmp_path: Path) -> None:
    provision(project, tmp_path / "kits")
    before = content(tmp_path / "kits/sites")
    provision(write_project(tmp_path, sites=["North", "South", "West", "East"]), tmp_path / "kits")
    after = content(tmp_path / "kits/sites")
    assert {name: after[name] for name in before} == before
    assert "East/site.key" in after


def test_the_servers_certificate_is_what_tls_wants(project: Path, tmp_path: Path) -> None:
    folder = provision(project, tmp_path / "kits").kit.folder
    certificate = certificates.read_certificate(folder / "server.crt")
    authority = certificates.read_certificate(folder / "ca.crt")
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert set(certificates.names_of(certificate)) == {
        "fed.example.org",
        "localhost",
        "127.0.0.1",
        "::1",
    }
    assert certificates.is_signed_by(certificate, authority)
    assert 397 < certificates.days_left(certificate) <= 398
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    assert handshake(folder, "fed.example.org")


def test_another_authority_is_not_trusted_in_a_handshake(project: Path, tmp_path: Path) -> None:
    folder = provision(project, tmp_path / "kits").kit.folder
    certificates.write_authority(tmp_path, certificates.make_authority("stranger"))
    with pytest.raises(
        ssl.SSLCertVerificationError, match="unable to get local issuer|self-signed|signature"
    ):
        handshake(folder, "fed.example.org", trust=tmp_path / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(folder, "other.example.org")


def test_a_certificate_that_has_ended_is_not_trusted_in_a_handshake(
    project: Path, tmp_path: Path
) -> None:
    folder = provision(project, tmp_path / "kits").kit.folder
    authority = certificates.read_authority(folder, passphrase=PASSPHRASE)
    certificates.write_server(
        folder, *certificates.make_server_certificate(authority, ["fed.example.org"], days=0)
    )
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        handshake(folder, "fed.example.org")


def handshake(folder: Path, name: str, trust: Path | None = None) -> bool:
    """Shake hands in memory with the server's certificate, trusting the kit's authority alone."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(trust or folder / "ca.crt")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = client.wrap_bio(back, there, server_hostname=name)
    callee = server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for end in (caller, callee):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return caller.version() == "TLSv1.3"


def test_a_sites_key_is_one_that_flower_takes(project: Path, tmp_path: Path) -> None:
    provision(project, tmp_path / "kits")
    kit = tmp_path / "kits/sites/North"
    key = serialization.load_ssh_private_key((kit / "site.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    registered = certificates.read_public_key(tmp_path / "kits/coordinator/keys/North.pub")
    assert registered == certificates.read_public_key(kit / "site.pub")
    numbers = serialization.load_ssh_public_key(registered.encode()).public_numbers()  # type: ignore[union-attr]
    assert numbers == key.public_key().public_numbers()


def test_renewal_makes_another_certificate_of_the_same_authority(
    project: Path, tmp_path: Path
) -> None:
    folder = provision(project, tmp_path / "kits").kit.folder
    before, authority = (folder / "server.crt").read_bytes(), (folder / "ca.crt").read_bytes()
    provision(project, tmp_path / "kits", renew=True)
    assert (folder / "server.crt").read_bytes() != before
    assert (folder / "ca.crt").read_bytes() == authority
    assert handshake(folder, "fed.example.org")


@pytest.mark.parametrize("state", ["ended", "another name", "another authority"])
def test_a_certificate_that_does_not_fit_is_renewed_without_asking(
    tmp_path: Path, state: str
) -> None:
    project = write_project(tmp_path)
    folder = provision(project, tmp_path / "kits").kit.folder
    authority = certificates.read_authority(folder, passphrase=PASSPHRASE)
    if state == "ended":
        certificates.write_server(
            folder, *certificates.make_server_certificate(authority, ["fed.example.org"], days=0)
        )
    elif state == "another authority":
        stranger = certificates.make_authority("stranger")
        certificates.write_server(
            folder, *certificates.make_server_certificate(stranger, ["fed.example.org"])
        )
    else:
        write_project(tmp_path, names=["10.0.0.5"])
    assert any(
        "server certificate" in words for words in provision(project, tmp_path / "kits").made
    )
    assert handshake(folder, "fed.example.org")


def test_a_certificate_near_its_end_is_a_warning(project: Path, tmp_path: Path) -> None:
    folder = provision(project, tmp_path / "kits").kit.folder
    authority = certificates.read_authority(folder, passphrase=PASSPHRASE)
    certificates.write_server(
        folder, *certificates.make_server_certificate(authority, ["fed.example.org"], days=9)
    )
    (warning,) = provision(project, tmp_path / "kits").warnings
    assert "--renew" in warning


def test_a_revoked_site_stays_out_until_it_gets_another_key(project: Path, tmp_path: Path) -> None:
    kits = tmp_path / "kits"
    kit = provision(project, kits).kit
    old = certificates.read_public_key(kit.keys / "North.pub")
    assert provision(project, kits, revoke=["North"]).revoked == ["North"]
    assert provision(project, kits).revoked == ["North"]
    assert not (kit.keys / "North.pub").exists()
    with pytest.raises(FedsgcgError, match="revoked"):
        provision(project, kits, register=[("North", kits / "sites/North/site.pub")])
    done = provision(project, kits, reissue=["North"])
    assert done.revoked == []
    new = certificates.read_public_key(kit.keys / "North.pub")
    assert new != old
    assert new == certificates.read_public_key(kits / "sites/North/site.pub")
    assert (kit.revoked / f"North-{certificates.fingerprint(old)}.pub").exists()


def test_a_lost_key_is_replaced_and_the_old_one_revoked(project: Path, tmp_path: Path) -> None:
    kits = tmp_path / "kits"
    kit = provision(project, kits).kit
    old = certificates.read_public_key(kit.keys / "North.pub")
    provision(project, kits, reissue=["North"])
    assert certificates.read_public_key(kit.keys / "North.pub") != old
    assert len(list(kit.revoked.iterdir())) == 1


def test_in_the_request_flow_no_private_key_travels(tmp_path: Path) -> None:
    project, kits = write_project(tmp_path, keys="site"), tmp_path / "kits"
    done = provision(project, kits)
    assert done.waiting == ["North", "South", "West"]
    assert not list(kits.rglob("site.key"))
    assert "fedsgcg-site request" in (kits / "sites/North/README.md").read_text()
    at_the_site = tmp_path / "hospital"
    shutil.copytree(kits / "sites/North", at_the_site)
    certificates.make_site_key(at_the_site, "North")
    assert provision(project, kits, register=[("North", at_the_site / "site.pub")]).waiting == [
        "South",
        "West",
    ]
    assert provision(project, kits).waiting == ["South", "West"]
    with pytest.raises(FedsgcgError, match="key of North"):
        provision(project, kits, register=[("South", at_the_site / "site.pub")])
    certificates.make_site_key(tmp_path, "North")
    with pytest.raises(FedsgcgError, match="another key is registered"):
        provision(project, kits, register=[("North", tmp_path / "site.pub")])


def test_a_kit_is_whole_once_the_data_folder_is_filled_in(project: Path, tmp_path: Path) -> None:
    provision(project, tmp_path / "kits")
    kit = tmp_path / "kits/sites/North"
    with pytest.raises(FedsgcgError, match="data_root"):
        read_site_file(kit)
    (kit / "site.yaml").write_text(
        (kit / "site.yaml").read_text().replace("data_root: ''", "data_root: /data")
    )
    site = read_site_file(kit)
    assert (site.site, site.project, site.server) == ("North", "prostate", "fed.example.org:8443")
    assert Path(site.key).is_file()
    assert Path(site.ca).is_file()


def test_nothing_that_is_reported_holds_a_secret(project: Path, tmp_path: Path) -> None:
    done: Provisioned = provision(project, tmp_path / "kits")
    text = str(done)
    for path in (tmp_path / "kits").rglob("*"):
        if path.name in SECRETS:
            lines = [
                line
                for line in path.read_text().splitlines()
                if len(line) > 20 and "-----" not in line
            ]
            assert lines
            assert not [line for line in lines if line in text]


def test_errors_of_the_project_file_are_reported_together(tmp_path: Path) -> None:
    path = write_project(
        tmp_path,
        server="nowhere",
        sites=["A", "a"],
        quorum=5,
        plan=["federation.round=3"],
        sights=1,
    )
    with pytest.raises(FedsgcgError) as caught:
        read_project(path)
    assert {problem.code for problem in caught.value.problems} == {"DEP-602"}
    for word in ("server", "sites", "quorum", "sights"):
        assert word in str(caught.value)
    with pytest.raises(FedsgcgError, match=r"federation\.round"):
        read_project(write_project(tmp_path, plan=["federation.round=3"]))


def test_a_folder_of_another_project_is_refused(project: Path, tmp_path: Path) -> None:
    provision(project, tmp_path / "kits")
    with pytest.raises(FedsgcgError, match="DEP-605"):
        provision(write_project(tmp_path, name="other"), tmp_path / "kits")


@pytest.mark.parametrize("action", ["revoke", "reissue"])
def test_an_unknown_site_is_refused_with_the_nearest_name(
    project: Path, tmp_path: Path, action: str
) -> None:
    with pytest.raises(FedsgcgError, match="did you mean 'North'"):
        provision(project, tmp_path / "kits", **{action: ["Nort"]})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["pkcs8", "rsa", "text", "missing"])
def test_a_key_that_flower_would_refuse_is_refused_first(tmp_path: Path, kind: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    path = tmp_path / "site.key"
    no_password = serialization.NoEncryption()
    if kind == "pkcs8":
        key = ec.generate_private_key(ec.SECP384R1())
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, no_password))
    elif kind == "rsa":
        form = serialization.PrivateFormat.OpenSSH
        path.write_bytes(
            rsa.generate_private_key(65537, 2048).private_bytes(
                serialization.Encoding.PEM, form, no_password
            )
        )
    elif kind == "text":
        path.write_text("hello")
    with pytest.raises(FedsgcgError, match="DEP-603"):
        certificates.read_site_key(path)


def test_addresses_of_the_project(tmp_path: Path) -> None:
    far = read_project(write_project(tmp_path))
    assert (far.host_to_bind, far.control_address) == ("0.0.0.0", "127.0.0.1:8444")
    near = read_project(write_project(tmp_path, server="127.0.0.1:8443", control_port=9000))
    assert (near.host_to_bind, near.control_address) == ("127.0.0.1", "127.0.0.1:9000")
    assert ipaddress.ip_address(near.host_to_bind).is_loopback


def test_settings_of_the_project_and_of_the_command_line(tmp_path: Path) -> None:
    plan = ["method=sgcg", "federation.rounds=7", "heldout=West"]
    project = read_project(write_project(tmp_path, plan=plan, quorum=2, round_deadline_s=90))
    tree = project.settings(("federation.rounds=3",))
    assert (tree["federation"]["rounds"], tree["federation"]["quorum"]) == (3, 2)
    assert (tree["heldout"], tree["method"]["name"], tree["federation"]["round_deadline_s"]) == (
        "West",
        "sgcg",
        90.0,
    )
    assert (tree["data"]["sites"], tree["data"]["root"]) == (["North", "South", "West"], "")


def test_a_kit_is_found_by_its_folder_or_the_one_above(project: Path, tmp_path: Path) -> None:
    kit = provision(project, tmp_path / "kits").kit
    assert Kit.at(tmp_path / "kits") == Kit.at(kit.folder) == kit
    with pytest.raises(FedsgcgError, match="DEP-604"):
        Kit.at(tmp_path)


@pytest.mark.row(4)
def test_missing_limits_are_a_warning_of_provision(tmp_path: Path) -> None:
    limits = {"North": {"patients": 300, "slices": 9000}}
    (warning,) = provision(write_project(tmp_path, limits=limits), tmp_path / "kits").warnings
    assert warning.startswith("[DEP-617]")
    assert "no numbers for South, West:" in warning
