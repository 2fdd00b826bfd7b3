"""Row 17 in a real federation: one hospital of four attacks, and the model stays that of the three.

Four synthetic hospitals train in this process with the app that runs at hospitals. The attacker's
app bends what leaves its training.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from safetensors.numpy import load_file

from fedsgcg.clients.app import build_client_app
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.norm_moments import MEAN, VARIANCE
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.study.inprocess import run_in_process
from fedsgcg.server.app import build_server_app
from tests.support import sites
from tests.support.scripted_run import status_of

pytestmark = pytest.mark.slow

HOSPITALS = ("East", "North", "South", "West")
ATTACKER = "West"
Values = np.ndarray
Attack = Callable[[Values, Values, Values], Values]

ATTACKS: dict[str, tuple[Attack, str]] = {
    "x100": (lambda start, own, other: start + 100 * (own - start), "PAY-113"),
    "sign flip": (lambda start, own, other: 2 * start - own, "PAY-114"),
    "free rider": (lambda start, own, other: start, "PAY-115"),
    "copy": (lambda start, own, other: other, "PAY-116"),
}


class Attacked:
    """The hospitals' app; the attacker's replies to `train` hold other weights.

    Args:
        tree: Settings of the hospitals.
        attack: Weights from (received, own, those of another hospital).
    """

    def __init__(self, tree: dict[str, object], attack: Attack) -> None:
        self.app = build_client_app(tree)
        self.attack = attack
        self.other: dict[bytes, Values] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        start = values_of(message.content)
        if message.metadata.message_type != "train":
            return self.app(message, context)
        if context.node_config["site"] != ATTACKER:
            reply = self.app(message, context)
            self.other.setdefault(start.tobytes(), values_of(reply.content))
            return reply
        reply = self.app(message, context)
        other = self.other.get(start.tobytes(), start)
        own = values_of(reply.content)
        bent = self.attack(start, own, other).astype(np.float32)
        if not np.array_equal(bent, other):
            # A negative running variance would be found without a comparison (PAY-112).
            layout = str(reply.content["message"]["layout"])
            bent = with_moments_of(Weights.decode(layout, bent), Weights.decode(layout, own))
        reply.content["weights"] = ArrayRecord({"values": Array(bent)})
        return reply


def with_moments_of(bent: Weights, own: Weights) -> Values:
    state = own.to_state()
    changed = {
        name: state[name] if name.endswith((MEAN, VARIANCE)) else array
        for name, array in bent.to_state().items()
    }
    return Weights.from_state(changed).values


def values_of(records: RecordDict) -> Values:
    arrays = records.array_records.get("weights")
    return np.zeros(0, np.float32) if arrays is None else arrays["values"].numpy()


def settings_of(root: Path, folder: Path, *overrides: str) -> dict[str, object]:
    """Settings of four training hospitals; without a quorum all must answer."""
    places = (f"data.root={root}", f"output={folder}", f"site.cache={root.parent / 'cache'}")
    names = f"data.sites=[{','.join(HOSPITALS)}]"
    fixed = (
        "federation.rounds=3",
        "federation.norm_policy=average",
        "method=source",
        "method.steps_per_round=8",
    )
    return compose(
        [*places, names, *sites.SMALL, *fixed, "federation.screening=reject", *overrides]
    )


def model_of(tree: dict[str, object], app: object) -> Values:
    """Train, and return the final model's floating-point weights as one array."""
    plan = Plan.from_tree(tree)
    run_in_process(build_server_app(tree), app, plan.members())
    state = load_file(Path(plan.output) / "model.safetensors")
    return np.concatenate([state[name].reshape(-1) for name in sorted(state)]).astype(np.float64)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attackers") / "hospitals"
    return write_hospitals(folder, sites=HOSPITALS, cases_per_site=4, shape=(4, 40, 40))


@pytest.fixture(scope="module")
def honest(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    """The model of the three others, of a run in which the attacker takes no part."""
    folder = tmp_path_factory.mktemp("honest")
    tree = settings_of(root, folder, f"observers=[{ATTACKER}]")
    model = model_of(tree, build_client_app(tree))
    assert status_of(folder)["status"] == "completed", "an honest hospital was warned of"
    return model


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.attack("scaled-update", "flipped-sign", "free-rider", "copied-update")
def test_an_attacker_is_rejected_and_the_model_is_that_of_the_others(
    attack: str, root: Path, honest: Values, tmp_path: Path
) -> None:
    bend, code = ATTACKS[attack]
    tree = settings_of(root, tmp_path)
    model = model_of(tree, Attacked(tree, bend))
    outcome = status_of(tmp_path)
    assert outcome["status"] == "degraded"
    found = {
        (note["code"], note["where"]) for note in outcome["problems"] if "round" in note["where"]
    }
    assert found == {(code, f"round {number}, {ATTACKER}") for number in (1, 2, 3)}
    assert np.linalg.norm(model - honest) <= 1e-6 * np.linalg.norm(honest)


@pytest.mark.parametrize("method", ["sgcg", "ram_sgcg"])
def test_four_honest_hospitals_are_left_alone(method: str, root: Path, tmp_path: Path) -> None:
    tree = settings_of(root, tmp_path, f"method={method}", "federation.norm_policy=recalibrate")
    model_of(tree, build_client_app(tree))
    outcome = status_of(tmp_path)
    assert (outcome["status"], outcome["problems"]) == ("completed", [])
