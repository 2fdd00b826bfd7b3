"""The authority's private key: encrypted or elsewhere; and keys that never leave their site."""

import shutil
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives import serialization

from fedsgcg.clients.guard.site_file import read_site_file
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy import certificates
from fedsgcg.deploy.cli import coordinator
from fedsgcg.deploy.cli import site as site_cli
from fedsgcg.deploy.coordinator.passphrase import VARIABLE, Passphrase
from fedsgcg.deploy.coordinator.project import read_project
from fedsgcg.deploy.coordinator.provision import AuthorityKey, provision
from fedsgcg.deploy.site.check import examine_folders
from tests.unit.deploy.test_provision import content, write_project

GOOD = "correct horse battery"


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def secret(folder: Path, text: str = GOOD) -> Passphrase:
    path = folder / "passphrase"
    path.write_text(text + "\n")
    return Passphrase(path)


@pytest.mark.attack("authority-key")
def test_the_key_of_a_real_federation_is_never_written_unencrypted(tmp_path: Path) -> None:
    project = write_project(tmp_path)
    with pytest.raises(FedsgcgError, match="DEP-616"):
        provision(project, tmp_path / "kits")
    assert not list(tmp_path.rglob("ca.*"))
    done = provision(project, tmp_path / "kits", authority=AuthorityKey(None, secret(tmp_path)))
    path = done.kit.folder / "ca.key"
    assert b"ENCRYPTED" in path.read_bytes()
    with pytest.raises(TypeError):
        serialization.load_pem_private_key(path.read_bytes(), None)
    again = provision(project, tmp_path / "kits")
    assert (again.made, again.warnings) == ([], []), "an ordinary call does not need the key"


def test_a_wrong_or_short_passphrase_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, kits = write_project(tmp_path), tmp_path / "kits"
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(FedsgcgError, match="12 characters"):
        provision(project, kits)
    monkeypatch.setenv(VARIABLE, GOOD)
    provision(project, kits)
    before = content(kits)
    with pytest.raises(FedsgcgError, match="DEP-603"):
        provision(
            project, kits, renew=True, authority=AuthorityKey(None, secret(tmp_path, "x" * 12))
        )
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(FedsgcgError, match="an encrypted key"):
        provision(project, kits, renew=True)
    assert content(kits) == before


@pytest.mark.attack("authority-key")
def test_a_key_that_is_kept_offline_is_asked_for_only_when_it_signs(tmp_path: Path) -> None:
    """A missing `ca.key` used to make another authority, and every hospital lost the server."""
    project, kits = write_project(tmp_path), tmp_path / "kits"
    stick = AuthorityKey(tmp_path / "stick" / "ca.key", secret(tmp_path))
    folder = provision(project, kits, authority=stick).kit.folder
    assert not (folder / "ca.key").exists()
    before = content(kits)
    assert provision(project, kits).made == []
    assert content(kits) == before
    with pytest.raises(FedsgcgError, match="--ca-key FILE"):
        provision(project, kits, renew=True)
    assert content(kits) == before
    provision(project, kits, renew=True, authority=stick)
    assert (folder / "ca.crt").read_bytes() == before["coordinator/ca.crt"]
    assert (folder / "server.crt").read_bytes() != before["coordinator/server.crt"]


def test_the_key_of_another_authority_signs_nothing(tmp_path: Path) -> None:
    project, kits = write_project(tmp_path), tmp_path / "kits"
    given = secret(tmp_path)
    provision(project, kits, authority=AuthorityKey(None, given))
    other = tmp_path / "other.key"
    key = certificates.make_authority("other").key
    certificates.write_authority_key(other, key, GOOD.encode())
    with pytest.raises(FedsgcgError, match="another authority's key"):
        provision(project, kits, renew=True, authority=AuthorityKey(other, given))


def test_an_older_kit_goes_on_and_its_key_is_encrypted_when_there_is_a_passphrase(
    tmp_path: Path,
) -> None:
    project, kits = write_project(tmp_path), tmp_path / "kits"
    given = AuthorityKey(None, secret(tmp_path))
    folder = provision(project, kits, authority=given).kit.folder
    authority = certificates.read_authority(folder, passphrase=GOOD.encode())
    certificates.write_authority_key(folder / "ca.key", authority.key, None)
    (warning,) = provision(project, kits).warnings
    assert "is not encrypted" in warning
    assert provision(project, kits, authority=given).made == ["ca.key is encrypted now"]
    same = certificates.read_authority(folder, passphrase=GOOD.encode())
    assert same.key.private_numbers() == authority.key.private_numbers()


def test_a_federation_on_one_machine_needs_no_passphrase(tmp_path: Path) -> None:
    done = provision(write_project(tmp_path, server="127.0.0.1:8443"), tmp_path / "kits")
    assert not certificates.is_encrypted(done.kit.folder / "ca.key")
    assert done.warnings == []


@pytest.mark.attack("foreign-key")
def test_by_default_a_key_is_made_at_its_site_and_both_sides_show_one_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of both sides: only `site.pub` travels, and both read the same digits."""
    monkeypatch.setenv("COLUMNS", "250")
    tree = {"name": "x", "server": "127.0.0.1:8443", "sites": ["North", "South"]}
    project, kits = tmp_path / "project.yaml", tmp_path / "kits"
    project.write_text(yaml.safe_dump(tree))
    assert read_project(project).keys == "site"
    assert coordinator.main(["provision", str(project), "-o", str(kits)]) == 0
    assert not list(kits.rglob("site.key"))
    said = capsys.readouterr().out
    assert "North: waiting for its site.pub" in said
    hospital = tmp_path / "hospital"
    shutil.copytree(kits / "sites/North", hospital)
    text = (hospital / "site.yaml").read_text()
    (hospital / "site.yaml").write_text(text.replace("data_root: ''", "data_root: ."))
    assert site_cli.main(["request", str(hospital)]) == 0
    spoken = capsys.readouterr().out.split()[-1]
    assert len(spoken) == 16 * 3 - 1
    register = ["--register", f"North={hospital / 'site.pub'}"]
    assert coordinator.main(["provision", str(project), "-o", str(kits), *register]) == 0
    said = capsys.readouterr().out
    assert spoken in said
    authority = "".join(said.split()[-2:])
    found = {finding.name: finding for finding in examine_folders(read_site_file(hospital))}
    assert found["key"].found.startswith(spoken)
    assert found["authority"].found == authority
    assert not list(kits.rglob("site.key"))


def test_a_project_of_before_goes_on_with_a_message(tmp_path: Path) -> None:
    """Keys that were issued stay valid under the new default; `requested` is its old name."""
    given = AuthorityKey(None, secret(tmp_path))
    kits = tmp_path / "kits"
    provision(write_project(tmp_path), kits, authority=given)
    before = content(kits / "coordinator" / "keys")
    now = write_project(tmp_path, keys="site", sites=["North", "South", "West", "East"])
    done = provision(now, kits)
    assert content(kits / "coordinator" / "keys") == before
    assert done.waiting == ["East"]
    assert any("registered keys stay valid" in line for line in done.warnings)
    assert read_project(write_project(tmp_path, keys="requested")).keys == "site"
    assert provision(now, kits, reissue=["North"]).waiting == ["North"]
    assert not (kits / "sites/North/site.key").exists(), "the revoked key is of no use"


@pytest.mark.parametrize(
    ("answers", "expected"), [((GOOD, GOOD), GOOD.encode()), ((GOOD, "another"), None)]
)
def test_on_a_terminal_the_passphrase_is_asked_for_twice(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[str, str], expected: bytes | None
) -> None:
    given = iter(answers)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda _prompt: next(given))
    if expected is None:
        with pytest.raises(FedsgcgError, match="two different passphrases"):
            Passphrase().for_new_key()
    else:
        assert Passphrase().for_new_key() == expected
