"""What is said to a user whose own file, own class or own label values are not quite right."""

from pathlib import Path

import pytest

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.names import number_of
from fedsgcg.common.settings.compose import compose, join
from fedsgcg.common.settings.own_code import load_class
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.grid import split_axes


def problem_of(work, *arguments) -> Problem:
    with pytest.raises(FedsgcgError) as caught:
        work(*arguments)
    (problem,) = caught.value.problems
    return problem


def test_an_own_file_is_given_by_its_path_or_by_the_folder() -> None:
    problem = problem_of(compose, ["data=our_photos"])
    assert "data=PATH.yaml" in problem.action
    assert "--config-dir DIR if it is in DIR/data/" in problem.action
    assert problem_of(compose, ["data=promise"]).action == "did you mean 'promise12'?"


def test_a_file_that_is_not_there_gets_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert problem_of(compose, ["data=photos.yml"]).action == ""
    Path("photos.yaml").write_text("name: photos\n")
    problem = problem_of(compose, ["data=photos.yml"])
    assert problem.action == "did you mean 'photos.yaml'?"
    assert str(tmp_path) in problem.found


@pytest.mark.parametrize("work", [lambda text: compose([text]), lambda text: split_axes([text])])
def test_a_class_with_a_dot_for_its_colon_is_shown_with_the_colon(work) -> None:
    assert "method=my_lab:Smooth" in problem_of(work, "method=my_lab.Smooth").action


def test_label_values_are_shown_as_a_list_of_numbers() -> None:
    tree = join(["data.classes={background: 0}", "data.structures={a: background}"])
    with pytest.raises(FedsgcgError) as caught:
        Plan.from_tree(tree)
    expected = {problem.where: problem.expected for problem in caught.value.problems}
    assert expected["data.classes.background"] == "a list such as [1]"
    assert expected["data.structures.a"] == "a list such as [A,B]"


def test_an_own_class_gets_the_advice_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hints_lab.py").write_text("class SmallNet: pass\n")
    (tmp_path / "hints_torn.py").write_text("import not_installed_anywhere\n")
    assert "PYTHONPATH" in problem_of(load_class, "hints_lab:SmallNet", "network").action
    monkeypatch.syspath_prepend(tmp_path)
    assert load_class("hints_lab:SmallNet", "network").__name__ == "SmallNet"
    problem = problem_of(load_class, "hints_lab:SmallNt", "network")
    assert problem.action == "did you mean 'SmallNet'?"
    assert str(tmp_path / "hints_lab.py") in problem.found
    problem = problem_of(load_class, "hints_torn:Net", "network")
    assert "not_installed_anywhere" in problem.found
    assert "PYTHONPATH" not in problem.action


def test_one_is_singular() -> None:
    assert [number_of(count, "cell") for count in (0, 1, 2)] == ["0 cells", "1 cell", "2 cells"]
