"""Fixtures that every test folder shares."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.plan import AugmentationSettings, DataSettings

# Without a GPU the Triton kernels run in Triton's interpreter, chosen when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]

# The order of floating-point sums depends on the number of threads.
torch.set_num_threads(1)


def real_root(name: str) -> Path:
    """Return the folder of a real data set; skip without it, or fail where it is required."""
    base = os.environ.get("FEDSGCG_REAL_DATA", "") or str(REPOSITORY.parent / "shared" / "data")
    root = Path(base) / name
    if not (root / "manifest.csv").is_file():
        reason = f"no real images at {root}; set FEDSGCG_REAL_DATA to the folder that holds {name}"
        if os.environ.get("FEDSGCG_REQUIRE_REAL_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return root


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("promise12")` is the folder of the images; skips, or fails if required."""
    return real_root


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small synthetic hospitals of five patients each."""
    return write_hospitals(
        tmp_path_factory.mktemp("hospitals"), cases_per_site=5, shape=(6, 40, 40), seed=7
    )


@pytest.fixture(scope="session")
def make_data() -> Callable[..., DataSettings]:
    """`make_data("promise12", image_size=64)`: the shipped data settings with some changed."""

    def make(name: str = "synthetic", **changes: object) -> DataSettings:
        folder = REPOSITORY / "configs" / "data"
        tree: dict[str, object] = {}
        for file in ("_base.yaml", f"{name}.yaml"):
            tree.update(yaml.safe_load((folder / file).read_text()))
        tree.pop("defaults")
        augmentation = tree["augmentation"]
        tree["augmentation"] = AugmentationSettings(**augmentation)  # type: ignore[arg-type]
        return DataSettings(**{**tree, **changes})  # type: ignore[arg-type]

    return make
