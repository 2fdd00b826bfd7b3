"""Container files are linted and locked down, and all their commands exist in this version."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fedsgcg.clients.guard.site_file import read_site_file
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.deploy.cli import coordinator as cli
from fedsgcg.deploy.cli import site as site_cli
from fedsgcg.deploy.coordinator.passphrase import Passphrase
from fedsgcg.deploy.coordinator.project import Project, read_project
from fedsgcg.deploy.coordinator.provision import AuthorityKey, provision

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
PROJECT = {
    "name": "demo",
    "server": "fed.example.org:8443",
    "sites": ["North", "South"],
    "data_root": "/data",
}
SECRET_WORDS = re.compile(r"(?i)(password|secret|token|private|ca\.key|server\.key)")
BIN = Path(sys.executable).parent  # the tools of this environment, whatever PATH says


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "project.yaml").write_text(yaml.safe_dump(PROJECT))
    (folder / "passphrase").write_text("only for this test")
    key = AuthorityKey(None, Passphrase(folder / "passphrase"))
    provision(folder / "project.yaml", folder / "kits", authority=key)
    return folder / "kits"


def composes(kits: Path) -> dict[str, Mapping[str, Any]]:
    paths = [
        DEPLOY / "compose.yaml",
        kits / "coordinator/compose.yaml",
        kits / "sites/North/compose.yaml",
    ]
    return {str(path): yaml.safe_load(path.read_text()) for path in paths}


def commands(kits: Path) -> Iterator[tuple[str, list[str]]]:
    """Return (file, command) for all commands of container files, units, charts and READMEs."""
    for path, tree in composes(kits).items():
        for service in tree["services"].values():
            yield from ((path, words) for words in programs_of(service["command"]))
    for path in [*DOCKERFILES, *(DEPLOY / "chart/templates").glob("*.yaml")]:
        for line in re.findall(r"(?:CMD|command:) (\[.*\])", path.read_text()):
            yield str(path), json.loads(line)
    for path in (DEPLOY / "systemd").glob("*.service"):
        (line,) = re.findall(r"ExecStart=(.*)", path.read_text())
        yield str(path), shlex.split(line)
    for path in kits.rglob("README.md"):
        for line in re.findall(
            r"^(?:`)?(fedsgcg(?:-site)? [^`#\n]*)", path.read_text(), flags=re.MULTILINE
        ):
            yield str(path), shlex.split(line)


def programs_of(command: list[str]) -> Iterator[list[str]]:
    """Return the fedsgcg commands in a container's command, also inside a shell command."""
    if command[0] != "sh":
        yield command
        return
    for text in re.findall(r"fedsgcg[^;]*", command[-1]):
        yield shlex.split(text.replace("$$site", "North"))


def test_every_command_is_one_of_this_version(kits: Path) -> None:
    parsers = {"fedsgcg": cli._parser(), "fedsgcg-site": site_cli._parser()}
    seen = set()
    for path, words in commands(kits):
        program = Path(words[0]).name
        if program in parsers and words[1:] != ["--help"]:
            parsers[program].parse_args(
                words[1:]
            )  # leaves the process, and so fails, for a wrong command
            seen.add((program, words[1]))
        else:
            assert words in (["fedsgcg", "--help"], ["chown", "10001:10001", "/kits", "/data"]), (
                path
            )
    wanted = {("fedsgcg", name) for name in ("provision", "serve", "run", "status", "hospitals")}
    wanted |= {("fedsgcg-site", name) for name in ("check", "approve", "join", "status")}
    assert wanted <= seen


def test_the_loopback_federation_prepares_itself_outside_a_container(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run what `compose.yaml` runs before the hospitals join, with its volumes as folders."""
    tree = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    places = {
        "/kits": str(tmp_path / "kits"),
        "/data": str(tmp_path / "data"),
        "/project.yaml": str(tmp_path / "p.yaml"),
    }
    text = tree["configs"]["project"]["content"].replace("/data", places["/data"])
    (tmp_path / "p.yaml").write_text(text)
    project: Project = read_project(tmp_path / "p.yaml")
    write_hospitals(tmp_path / "data/hospitals", cases_per_site=2, shape=(4, 32, 32), seed=1)
    for name in ("provision", "approve"):
        for variable, value in tree["services"][name].get("environment", {}).items():
            monkeypatch.setenv(variable, value)
        for words in programs_of(tree["services"][name]["command"]):
            main = cli.main if words[0] == "fedsgcg" else site_cli.main
            assert main([outside_of(word, places) for word in words[1:]]) == 0, words
    site = read_site_file(tmp_path / "kits/sites/North")
    assert site.data_root == str(tmp_path / "data/hospitals")
    assert Path(site.approved).is_file()
    joined = {
        words[2]
        for name, service in tree["services"].items()
        for words in [service["command"]]
        if "join" in words
    }
    assert joined == {f"/kits/sites/{name}" for name in project.sites}


def outside_of(word: str, places: Mapping[str, str]) -> str:
    """A path of a container as one of this machine; any other word as it is."""
    inside = next((place for place in places if word.startswith(place)), "")
    return word.replace(inside, places[inside], 1) if inside else word


def test_containers_are_locked_down(kits: Path) -> None:
    for path, tree in composes(kits).items():
        for name, service in tree["services"].items():
            assert service["read_only"] is True, (path, name)
            assert service["cap_drop"] == ["ALL"], (path, name)
            assert service["security_opt"] == ["no-new-privileges:true"], (path, name)
            assert service["user"] == "10001:10001" or service["command"][0] == "chown", (
                path,
                name,
            )
            assert "mem_limit" in service, (path, name)
            assert "privileged" not in service
            assert not SECRET_WORDS.search(json.dumps(service.get("environment", {})))


def test_images_are_read_only_where_a_hospital_works(kits: Path) -> None:
    loopback = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("east", "north", "south", "west"):
        assert "data:/data:ro" in loopback[name]["volumes"]
    for service in yaml.safe_load((kits / "sites/North/compose.yaml").read_text())[
        "services"
    ].values():
        (mount,) = [volume for volume in service["volumes"] if volume["target"] == "/data"]
        assert mount["read_only"] is True
        assert "ports" not in service
    chart = (DEPLOY / "chart/templates/workload.yaml").read_text()
    assert re.search(r"mountPath: /data\n\s+readOnly: true", chart)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_have_no_root_and_no_secret(path: Path) -> None:
    text = path.read_text()
    users = re.findall(r"^USER (.*)", text, flags=re.MULTILINE)
    assert users[-1] == "10001:10001"
    for line in re.findall(r"^(?:ARG|ENV) .*", text, flags=re.MULTILINE):
        assert not SECRET_WORDS.search(line)
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)", text, flags=re.MULTILINE)
        for word in line.split()[:-1]
    }
    allowed = {
        line[1:]
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied == allowed
    assert all((REPOSITORY / name).exists() for name in copied)
    found = subprocess.run([str(BIN / "hadolint"), str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_yaml_files_are_clean(kits: Path) -> None:
    rules = (
        "{extends: default, rules: {line-length: {max: 100}, document-start: disable, "
        "braces: {max-spaces-inside: 1}}}"
    )
    files = [DEPLOY / "compose.yaml", DEPLOY / "chart/values.yaml", DEPLOY / "chart/Chart.yaml"]
    files += [kits / "coordinator/compose.yaml", kits / "sites/North/compose.yaml"]
    found = subprocess.run(
        [str(BIN / "yamllint"), "-d", rules, *map(str, files)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_the_charts_values_keep_to_their_schema() -> None:
    schema = json.loads((DEPLOY / "chart/values.schema.json").read_text())
    values = yaml.safe_load((DEPLOY / "chart/values.yaml").read_text())
    jsonschema.validate(values, schema)
    for change in ({"role": "boss"}, {"gpus": -1}, {"image": {}}, {"surprise": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values, **change}, schema)
    used = set(
        re.findall(r"\.Values\.(\w+)", (DEPLOY / "chart/templates/workload.yaml").read_text())
    )
    assert used <= set(values)
