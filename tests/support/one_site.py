"""Store and network of one small hospital, for tests of its training steps."""

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.device import choose_device
from fedsgcg.common.networks import UNet, build_network
from fedsgcg.common.settings.plan import Plan
from tests.support import sites


def opened(hospital, *overrides):
    """Return the plan and the store of North, all of whose four patients train by default."""
    root, folder = hospital
    plan = sites.plan_of(root, folder, "data.validation_fraction=0", *overrides)
    return plan, open_store(
        open_site(root, "North", plan.data), plan.data, folder / "cache", heldout=False
    )


def network_of(plan: Plan) -> UNet:
    choose_device("cpu", threads=1)
    return build_network(plan.network, 3, plan.data.out_channels, 0)
