"""`fedsgcg settings NAME`: every setting is explained by the docstring of its section."""

import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.compose import GROUPS, join, known_settings
from fedsgcg.common.settings.help import described, explain, sections
from fedsgcg.deploy.cli.coordinator import main


def test_every_setting_has_a_meaning_and_a_kind() -> None:
    found = described()
    assert not [
        name
        for name in known_settings()
        if name not in found and name not in sections() and name not in GROUPS
    ]
    assert not [name for name, setting in found.items() if not setting.meaning]
    assert not [name for name, setting in found.items() if not (setting.kind or setting.choices)]


def test_one_setting_is_explained_by_meaning_unit_default_and_choices() -> None:
    text = explain("federation.round_deadline_s", join())
    assert "seconds" in text
    assert "3600.0" in text
    text = explain("memory", join(["prototypes.memory=lagged"]))
    assert text.startswith("prototypes.memory\n")
    assert "default  lagged" in text
    assert "cumulative | discount | lagged" in text
    assert "{background: [0], gland: [1]}" in explain("data.classes", join())
    assert "promise12" in explain("data", join())
    assert "ablation" in explain("experiment", join())
    text = explain("augmentation", join())
    assert "default | none | strong" in text
    assert "data.augmentation.intensity.bias_field" in text


def test_an_unknown_or_ambiguous_name_gets_a_hint() -> None:
    with pytest.raises(FedsgcgError, match="federation.rounds"):
        explain("federation.round", join())
    with pytest.raises(FedsgcgError, match=r"prototypes\.weighting"):
        explain("weighting", join())


def test_the_command_explains_names_and_shows_all_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["settings", "data=promise12", "data.image_size", "rounds"]) == 0
    out = capsys.readouterr().out
    assert "pixels" in out
    assert "federation.rounds" in out
    assert main(["settings"]) == 0
    assert "sgcg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "instead"),
    [("-m", "comma-separated"), ("--multirun", "comma-separated"), ("--cfg", "settings")],
)
def test_options_of_hydra_say_what_to_use_instead(
    flag: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "seed=1", flag, "method=sgcg"]) == 2
    assert instead in capsys.readouterr().err
