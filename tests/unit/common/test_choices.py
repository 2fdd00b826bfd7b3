"""Own settings files: a folder with the layout of `configs/`, and a YAML file as a choice."""

import json
from pathlib import Path

import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.compose import choices_of, chosen, compose, join, own_choices
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.grid import split_axes, variants

CORD = """\
classes: {background: [0], cord: [1]}
structures: {cord: [cord]}
image_size: 96
"""


@pytest.fixture(params=["own", "own ${x} [a], 'b'"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with own data, method and experiment; also with signs that Hydra's grammar knows."""
    root = tmp_path / request.param
    for name, text in {
        "data/cord.yaml": CORD,
        "method/slow.yaml": "defaults: [sgcg]\nlearning_rate: 1.0e-4\n",
        "experiment/mine.yaml": (
            "defaults:\n  - override /data: cord\n  - override /method: slow\n"
            "federation: {rounds: 2}\n"
        ),
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def refused(*overrides: str) -> FedsgcgError:
    with pytest.raises(FedsgcgError) as caught:
        compose(overrides)
    assert {problem.code for problem in caught.value.problems} == {"CFG-001"}
    return caught.value


def test_own_files_are_choices_as_well_as_the_shipped_ones(folder: Path) -> None:
    own = f"config_dir={folder}"
    tree = compose([own, "experiment=mine", "data.image_size=64"])
    assert tree["data"]["classes"] == {"background": [0], "cord": [1]}
    assert (tree["data"]["name"], tree["data"]["image_size"], tree["data"]["stack"]) == (
        "cord",
        64,
        3,
    )
    assert (
        tree["method"]["name"],
        tree["method"]["learning_rate"],
        tree["federation"]["rounds"],
    ) == ("sgcg", 1e-4, 2)
    assert {"cord", "promise12"} <= set(choices_of("data", own_choices([own])))
    assert chosen([own, "experiment=mine"])["method"] == "slow"
    assert "cord" not in choices_of("data")
    assert compose(["data=synthetic"])["data"]["name"] == "synthetic"


def test_a_yaml_file_is_a_choice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "data" / "cord.yaml"
    assert (
        compose([f"data={path}"])["data"] == compose([f"config_dir={folder}", "data=cord"])["data"]
    )
    monkeypatch.chdir(folder / "data")
    (folder / "data" / "promise12.yaml").write_text(CORD)
    assert compose(["data=promise12.yaml"])["data"]["classes"] == {"background": [0], "cord": [1]}
    assert compose(["data=promise12"])["data"]["classes"] == {"background": [0], "prostate": [1]}


def test_the_plan_does_not_know_where_its_settings_came_from(folder: Path) -> None:
    by_folder = Plan.from_tree(join([f"config_dir={folder}", "data=cord"]))
    by_path = Plan.from_tree(join([f"data={folder / 'data' / 'cord.yaml'}"]))
    assert by_folder.digest() == by_path.digest()
    sent = json.dumps(by_folder.to_tree())
    assert str(folder) not in sent
    assert Plan.from_tree(join(run_config={"config-json": sent})).digest() == by_folder.digest()


def test_a_site_resolves_no_files_or_code_of_its_own_for_a_coordinator() -> None:
    for text in ("config_dir=/etc", "data=/etc/x.yaml", "method=os:Class", "network.name=os:Class"):
        with pytest.raises(FedsgcgError) as caught:
            join(run_config={"overrides": f"seed=1 {text}"})
        assert caught.value.problems[0].found == text


def test_every_name_of_an_own_file_must_be_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("clases: {background: [0]}\nimage_sise: 64\naugmentation: {flipp: 1}\n")
    error = refused(f"data={path}")
    assert [problem.where for problem in error.problems] == [str(path)] * 3
    assert "did you mean 'data.classes'?" in str(error)
    path.write_text("metod: {}\n")
    assert "did you mean 'method'?" in str(refused(f"experiment={path}"))


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "a: 1\na: 2\n", "\x00"])
def test_a_file_that_is_no_settings_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert {problem.where for problem in refused(f"data={path}").problems} == {str(path)}
    path.unlink()
    assert "no such file" in str(refused(f"data={path}"))


def test_a_base_that_is_not_there_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("defaults: [_bse]\n")
    assert str(path) in str(refused(f"data={path}"))


def test_a_folder_that_holds_no_settings_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in str(refused(f"config_dir={tmp_path / 'none'}"))
    assert "data/" in str(refused(f"config_dir={tmp_path}"))
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "a.yaml").write_text("")
    assert "rename it to 'method'" in str(refused(f"config_dir={tmp_path}"))
    (tmp_path / "methods").rename(tmp_path / "method")
    (tmp_path / "method" / "ram.yaml").write_text("")
    assert "the name of a choice that fedsgcg provides" in str(refused(f"config_dir={tmp_path}"))


def test_maps_on_the_command_line_replace() -> None:
    tree = compose(
        [
            "data=promise12",
            "data.classes={background: [0], cord: [1]}",
            "data.structures={cord: [cord]}",
            "grid={}",
        ]
    )
    assert tree["data"]["classes"] == {"background": [0], "cord": [1]}
    assert tree["data"]["structures"] == {"cord": ["cord"]}
    assert compose(["experiment=ablation", "grid={seed: [1, 2]}"])["grid"] == {"seed": [1, 2]}
    assert compose(["data.classes.gland=[2]"])["data"]["classes"] == {
        "background": [0],
        "gland": [2],
    }
    assert "prostate" in str(refused("data=synthetic", "data.classes.prostate=[2]"))
    refused("data.classes={a: [0]}", "data.classes.gland=[2]")
    assert (
        compose(["data.augmentation={flip: 0.1}"])["data"]["augmentation"]["rotate_degrees"] == 10.0
    )


def test_a_study_sweeps_own_methods_and_knows_what_they_read(folder: Path) -> None:
    axes, rest = split_axes(
        [f"config_dir={folder}", "method=source,slow", "prototypes.weight=0.1,0.5"]
    )
    assert axes["method"] == ["source", "slow"]
    traits = {"source": (), "slow": ("contrasts",)}
    labels = [variant.label for variant in variants(axes, "source", "by_site", traits)]
    assert labels == ["source", "slow weight=0.1", "slow weight=0.5"]
    assert rest == [f"config_dir={folder}"]


def test_files_and_classes_are_labelled_by_their_names() -> None:
    axes = {"method": ["/x/a.yaml", "lab.losses:Margin", "source"]}
    assert [variant.label for variant in variants(axes, "source", "by_site")] == [
        "a",
        "Margin",
        "source",
    ]
    axes = {"method": ["/x/a.yaml", "/y/a.yaml"]}
    assert [variant.label for variant in variants(axes, "source", "by_site")] == [
        "/x/a.yaml",
        "/y/a.yaml",
    ]
