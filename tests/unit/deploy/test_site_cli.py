"""The hospital's command line: what it shows, what it asks, what it returns."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from flwr.app import Array

from fedsgcg.clients.data.cache import prune, touch_used
from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.approval import (
    Bundle,
    approve,
    bundle_of_folder,
    is_approved,
    keep,
)
from fedsgcg.clients.guard.site_file import write_site_file
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.cli import site as site_cli
from fedsgcg.deploy.environment import KEY_IN_USE, KEY_UNKNOWN
from fedsgcg.deploy.site import supervisor
from fedsgcg.deploy.site.commands import (
    environment,
    free_port,
    new_secret,
    quoted,
    supernode_command,
)
from fedsgcg.deploy.site.supervisor import Join, joined_pid, only_one
from tests.conftest import REPOSITORY
from tests.support import sites
from tests.support.loopback import certificate
from tests.unit.clients.test_approval import fab
from tests.unit.clients.test_policy import policy_for


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("cli") / "data")


@pytest.fixture
def kit(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    write_site_file(tmp_path / "site.yaml", policy_for(root, tmp_path))
    return tmp_path


def test_the_ledger_is_readable_and_its_chain_verified(kit, capsys):
    assert site_cli.main(["ledger", str(kit)]) == 1
    assert "Nothing has left North yet." in capsys.readouterr().out
    path = kit / "home/ledger.jsonl"
    for number in range(25):
        ledger.append(
            path,
            round_number=number,
            kind="train",
            parts={"weights": 4000, "text": 10},
            withheld=[],
            sha256="0" * 64,
        )
    ledger.append(
        path,
        round_number=9,
        kind="train",
        parts={"text": 5},
        withheld=[],
        sha256="0" * 64,
        note="SITE-503",
    )
    assert site_cli.main(["ledger", str(kit)]) == 0
    said = capsys.readouterr().out
    assert "26 messages, 100,255 bytes; the chain of hashes is intact." in said
    assert "SITE-503: The work took longer than the site's deadline and was stopped." in said
    assert said.count("4,000") == 19
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0].replace(b"4000", b"4001"), *lines[1:]]))
    assert site_cli.main(["ledger", str(kit)]) == 2
    assert "SITE-501" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_ledger_is_shown_whole_on_a_console_of_any_width(kit, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    parts = {"weights": 31_000_000, "statistics": 84_012, "text": 5_123}
    ledger.append(
        kit / "home/ledger.jsonl",
        round_number=120,
        kind="statistics",
        parts=parts,
        withheld=["cup"],
        sha256="0" * 64,
    )
    assert site_cli.main(["ledger", str(kit)]) == 0
    said = capsys.readouterr().out
    assert all(
        text in said for text in ("31,000,000", "84,012", "5,123", " 120 ", "statistics", "cup")
    )
    assert "amplitudes" not in said  # a part that never left has no column


def test_a_dry_run_shows_the_bytes_of_a_real_reply_and_leaves_nothing(kit, root, capsys):
    approve(bundle_of_folder(REPOSITORY), kit / "approved.json", "test")
    settings = [
        "data.image_size=32",
        "network.base_width=4",
        "method.steps_per_round=1",
        "method.batch_size=8",
    ]
    assert site_cli.main(["ledger", str(kit), "--dry-run", "--settings", *settings]) == 0
    said = capsys.readouterr().out
    travels = len(Array(sites.weights(sites.plan_of(root, kit)).values).data)
    assert f"{travels:,}" in said
    assert "Nothing was sent." in said
    assert not (kit / "home/ledger.jsonl").exists()


def test_a_dry_run_with_secure_sums_shows_masked_bytes_and_no_weights(kit, root, capsys):
    approve(bundle_of_folder(REPOSITORY), kit / "approved.json", "test")
    settings = [
        *("data.image_size=32", "network.base_width=4", "method.steps_per_round=1"),
        *("privacy=secure_sums", "method.batch_size=8"),
    ]
    assert site_cli.main(["ledger", str(kit), "--dry-run", "--settings", *settings]) == 0
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "│" in line}
    masked = int(rows["masked"].split("│")[2].strip().replace(",", ""))
    assert masked > 8 * sites.weights(sites.plan_of(root, kit)).values.size
    assert not {"weights", "statistics", "moments"} & set(rows)
    assert not (kit / "home/releases.jsonl").exists()


def test_a_dry_run_that_the_policy_refuses_says_why(kit, capsys):
    settings = ["site.threads=9", "data.image_size=32", "network.base_width=4"]
    approve(bundle_of_folder(REPOSITORY), kit / "approved.json", "test")
    assert site_cli.main(["ledger", str(kit), "--dry-run", "--settings", *settings]) == 2
    said = capsys.readouterr().err
    assert "POL-703" in said
    assert "site.threads" in said


def test_approve_offers_the_installed_code_first_and_needs_a_yes(kit, capsys):
    path = kit / "approved.json"
    assert site_cli.main(["approve", str(kit)]) == 1
    assert not path.exists()
    said = capsys.readouterr().out
    assert "no terminal to ask on" in said
    assert "--yes" in said
    assert site_cli.main(["approve", str(kit), "--yes"]) == 0
    assert is_approved(bundle_of_folder(REPOSITORY), path)
    assert site_cli.main(["approve", str(kit)]) == 0
    assert "Nothing is waiting for approval" in capsys.readouterr().out


def test_approve_shows_what_a_refused_bundle_changes(kit, capsys):
    path = kit / "approved.json"
    approve(Bundle({"clients/app.py": b"one\n"}), path, "test")
    new = Bundle({"clients/app.py": b"one\ntwo\n"}, "clients.other:app")
    keep(new, path)
    assert site_cli.main(["approve", str(kit), "--diff"]) == 1
    said = capsys.readouterr().out
    assert "clients/app.py  (+1 -0 lines)" in said
    assert "+two" in said
    assert "fedsgcg.clients.app:app -> clients.other:app" in said
    assert site_cli.main(["approve", str(kit), "--hash", "ffff"]) == 2
    assert site_cli.main(["approve", str(kit), "--hash", new.digest[:8], "--yes"]) == 0
    assert is_approved(new, path)


def test_approve_takes_a_bundle_file(kit, capsys):
    file = kit / "app.fab"
    file.write_bytes(fab({"clients/app.py": "x"}))
    assert site_cli.main(["approve", str(kit), str(file), "--yes"]) == 0
    assert is_approved(Bundle({"clients/app.py": b"x"}), kit / "approved.json")
    file.write_bytes(b"nonsense")
    assert site_cli.main(["approve", str(kit), str(file), "--yes"]) == 2
    assert "POL-705" in capsys.readouterr().err


def test_status_and_leave_of_a_site_that_has_not_joined(kit, capsys):
    assert site_cli.main(["status", str(kit)]) == 1
    assert "not joined" in capsys.readouterr().out
    assert site_cli.main(["leave", str(kit), "--for-good"]) == 0
    said = capsys.readouterr().out
    assert "North had not joined." in said
    assert "revoke this site's key" in said


def test_a_kit_without_a_site_file_is_an_error_not_a_traceback(tmp_path, capsys):
    for command in ("check", "join", "status", "leave", "ledger", "approve", "cache", "request"):
        assert site_cli.main([command, str(tmp_path)]) == 2
        assert "DEP-601" in capsys.readouterr().err


def test_request_makes_a_key_and_shows_the_public_half_only(kit, capsys):
    assert site_cli.main(["request", str(kit)]) == 0
    said = capsys.readouterr().out
    assert "ecdsa-sha2-nistp384 " in said
    assert "PRIVATE" not in said
    assert (kit / "site.key").stat().st_mode & 0o077 == 0
    key = (kit / "site.key").read_bytes()
    assert site_cli.main(["request", str(kit)]) == 0
    assert (kit / "site.key").read_bytes() == key, "a second request must not change the key"


def test_old_slices_are_pruned_and_used_ones_stay(kit, root, capsys):
    folder = kit / "slices"
    folder.mkdir()
    now = time.time()
    for name, days in (("old", 40), ("recent", 3), ("used", 40)):
        (folder / f"{name}.arrow").write_bytes(b"x" * 10)
        os.utime(folder / f"{name}.arrow", (now - days * 86400, now - days * 86400))
    (folder / "old.lock").touch()
    touch_used(folder / "used.arrow")
    assert prune(kit) == {folder / "old.arrow": 10}
    assert sorted(path.name for path in folder.iterdir()) == ["recent.arrow", "used.arrow"]
    assert site_cli.main(["cache", str(kit), "--prune", "--days", "3650"]) == 0
    assert "removed 0 files" in capsys.readouterr().out


def test_the_node_is_started_with_tls_and_key_and_never_without(kit, root):
    policy = policy_for(root, kit, max_retries=4)
    command = supernode_command(policy, kit / "site.yaml", 4321, kit / "secret")
    assert "--insecure" not in command
    given = command[command.index("flwr.supernode.cli.flower_supernode:flower_supernode") + 1 :]
    options = dict(zip(given[::2], given[1::2], strict=True))
    assert options["--root-certificates"] == policy.ca
    assert options["--auth-supernode-private-key"] == policy.key
    assert options["--node-config"] == f"site='North' site-file='{kit.resolve()}/site.yaml'"
    assert (options["--host"], options["--port"], options["--max-retries"]) == (
        "127.0.0.1",
        "4321",
        "4",
    )
    with pytest.raises(FedsgcgError, match="quotes"):
        quoted("it's")


@pytest.mark.parametrize(
    ("device", "visible"), [("cpu", ""), ("cuda:1", "1"), ("cuda", "7"), ("auto", "7")]
)
def test_a_site_sees_its_own_card_only(kit, root, monkeypatch, device, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("NO_PROXY", "intranet")
    variables = environment(policy_for(root, kit, device=device))
    assert variables["CUDA_VISIBLE_DEVICES"] == visible
    assert variables["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert variables["FLWR_HOME"].startswith(str(kit))


def test_the_secret_is_new_each_time_and_for_the_owner_only(tmp_path):
    first = new_secret(tmp_path / "s").read_bytes()
    assert len(first) == 64
    assert new_secret(tmp_path / "s").read_bytes() != first
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    assert free_port() > 1023


def test_a_site_joins_once(kit):
    home = kit / "home"
    home.mkdir()
    assert joined_pid(home) == 0
    with only_one(home):
        (home / "join.json").write_text(json.dumps({"pid": 42}))
        assert joined_pid(home) == 42
        with pytest.raises(FedsgcgError, match="SITE-508"), only_one(home):
            pass
    assert joined_pid(home) == 0


@pytest.mark.parametrize(
    ("line", "stuck"),
    [
        ("INFO :      Giving up reconnection after 5 tries.", True),
        ("INFO :      Run ID 7 is not in `RUNNING` status. Ignoring message ab12.", True),
        ("INFO :      Run ID 7 is not in `RUNNING` status. Ignoring reply message ab12.", False),
        ("INFO :      Received successfully", False),
    ],
)
def test_a_supernode_that_says_it_is_stuck_is_started_anew(kit, line, stuck):
    join = Join(policy_for(kit, kit), kit, lambda text: None)
    join._notice(line)
    assert bool(join.stuck) == stuck


@pytest.mark.parametrize(
    ("reason", "code", "advice"),
    [
        (f"{KEY_IN_USE} 3 s ago", "SITE-521", "none if this node was just restarted"),
        (f"{KEY_IN_USE} 3 s ago", "SITE-521", "a copy of this kit is in use on another machine"),
        (KEY_UNKNOWN, "SITE-509", "is registered or revoked"),
        ("", "SITE-509", "perhaps a copy of this kit"),
        ("For more information, visit: <x>", "SITE-509", "compare the clocks"),
    ],
)
def test_a_refused_node_shows_the_servers_reason(tmp_path, reason, code, advice):
    said = []
    join = Join(policy_for(tmp_path, tmp_path), tmp_path, said.append)
    refused = "[code: 1501] Failed to activate SuperNode."
    join._notice("Failed to initialize the connection to the SuperLink.")
    join._notice(refused, "Failed to initialize the connection to the SuperLink.")
    join._notice(reason, refused)
    join._notice("more", reason)
    (text,) = said
    assert text.startswith(f"[{code}]")
    assert advice in text
    assert ("copy" in text) == (reason != KEY_UNKNOWN)


def test_after_a_lost_link_a_node_starts_as_soon_as_the_server_is_back(tmp_path, monkeypatch):
    """It waited for its whole pause, and the pauses grow."""
    join = Join(policy_for(tmp_path, tmp_path), tmp_path, lambda text: None)
    monkeypatch.setattr(supervisor, "SHORTEST_PAUSE_S", 0.01)
    looks = []

    def answers(of):
        """Whether the server answers, each time it is asked; afterwards it does not."""
        remaining = list(of)

        def answer(policy):
            looks.append(policy)
            return remaining.pop(0) if remaining else join.stopping.set()

        monkeypatch.setattr(supervisor, "server_answers", answer)
        looks.clear()
        join.stopping.clear()
        join._pause(600)
        return len(looks), join.stopping.is_set()

    join.stuck = supervisor.LINK_GIVEN_UP
    assert answers([False, False, True]) == (3, False)
    assert answers([True, False, True]) == (3, False)
    # A server that answers all the time is not what stopped the node: it keeps its pause.
    assert answers([True, True, True]) == (4, True)


def test_a_server_behind_a_balancer_answers_only_with_its_certificate(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as balancer:
        port = balancer.getsockname()[1]

        def close_at_once():
            for _ in range(2):  # the look at the port, and the one at the certificate
                balancer.accept()[0].close()

        thread = threading.Thread(target=close_at_once)
        thread.start()
        certificate(tmp_path, "ca")
        policy = policy_for(tmp_path, tmp_path, server=f"127.0.0.1:{port}")
        assert not supervisor.server_answers(policy)
        thread.join(10)
        assert not thread.is_alive()
    assert not supervisor.server_answers(policy)  # nothing listens
