"""A wrong command or option gets an answer that says what was meant."""

import argparse
import json
from pathlib import Path

import pytest

from fedsgcg.deploy.cli import coordinator, site
from fedsgcg.deploy.cli.parsing import COMMANDS


@pytest.mark.parametrize("program", [coordinator, site])
def test_the_listed_commands_are_those_of_the_program(program) -> None:
    parser = program._parser()
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    assert sorted(COMMANDS[parser.prog]) == sorted(commands.choices)


def refused(main, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "word", "meant"),
    [
        (coordinator.main, "predict", "fedsgcg-site predict --help"),
        (coordinator.main, "predcit", "did you mean `fedsgcg-site predict`?"),
        (coordinator.main, "stud", "did you mean `fedsgcg study`?"),
        (coordinator.main, "status1", "did you mean `fedsgcg status`?"),
        (coordinator.main, "zzz", "study, simulate, settings"),
        (coordinator.main, "-q", "options come after the command: fedsgcg COMMAND -q"),
        (site.main, "study", "fedsgcg study --help"),
        (site.main, "jion", "did you mean `fedsgcg-site join`?"),
    ],
)
def test_a_wrong_command_gets_the_one_that_was_meant(
    main, word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert meant in refused(main, word, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (("--heldout", "all"), "heldout=all"),
        (("--heldout=all",), "heldout=all"),
        (("data=synthetic", "--data.root", "DIR", "seed=1"), "data.root=DIR"),
        (("--data", "fundus"), "data=fundus"),
        (("--seed",), "seed=VALUE"),
    ],
)
def test_a_setting_given_as_an_option_is_shown_as_a_setting(
    arguments: tuple[str, ...], setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(coordinator.main, "study", *arguments, capsys=capsys)
    assert f"settings are given as name=value: {setting}" in text


def test_an_option_that_is_no_setting_is_only_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(coordinator.main, "study", "--bogus", capsys=capsys)
    assert text.rstrip().endswith("unrecognized arguments: --bogus")


def test_an_explained_setting_is_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    assert coordinator.main(["settings", "rounds", "seed", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["setting"] for event in events] == ["rounds", "seed"]
    assert "Number of rounds" in events[0]["text"]


@pytest.mark.parametrize("command", ["clean", "report"])
def test_a_folder_that_is_not_there_is_not_an_empty_one(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coordinator.main([command, str(tmp_path / "nowhere")]) == 2
    assert "found: no such folder" in capsys.readouterr().err
    assert coordinator.main([command, str(tmp_path)]) == 2
    assert "found: no study.yaml in this folder" in capsys.readouterr().err
