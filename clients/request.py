"""Handling one message at a site: its settings, its role and the conversion of errors to codes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray

from fedsgcg.clients.data.case_files import discover_sites, ensure_data, open_site, resolve_cache
from fedsgcg.clients.data.store import CaseStore, open_store
from fedsgcg.clients.device import choose_device
from fedsgcg.clients.guard.approval import check_approved
from fedsgcg.clients.guard.egress import UNKNOWN_IDENTITY, identity_of, log_exception, release_error
from fedsgcg.clients.guard.limits import budget_of
from fedsgcg.clients.guard.policy import alias_salt, apply_policy, only_inside_data_root, policy_of
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.clients.local_state import LocalState
from fedsgcg.clients.methods.class_statistics import patients_per_class, pixels_per_class
from fedsgcg.clients.out_of_memory import out_of_memory
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.system import expand
from fedsgcg.common.settings.flower_run import plan_of_run
from fedsgcg.common.settings.message_sizes import request_sizes
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import Request, decode_request
from fedsgcg.common.wire.payload import Identity


@dataclass(frozen=True)
class SiteRequest:
    """What a handler needs to answer one message.

    Attributes:
        request: What the coordinator sent.
        plan: The settings of the federation.
        site: Name of this site.
        root: Folder of the data set.
        home: The site's own folder: ledger, error log, aliases, pictures.
        kind: Type of the message.
        policy: The site's own settings, already applied to `plan`; None in a simulation.
    """

    request: Request
    plan: Plan
    site: str
    root: Path
    home: Path
    kind: str
    policy: SiteFile | None = None

    @property
    def identity(self) -> Identity:
        """Run, fold, round and plan of the request."""
        return self.request.identity

    @property
    def role(self) -> str:
        """`train`, `heldout` or `observer` in this fold."""
        return self.plan.role(self.site)

    @cached_property
    def device(self) -> torch.device:
        """Device of this site; raises CFG-004 when the requested device is unavailable."""
        return choose_device(self.plan.site.device, self.plan.site.threads)

    @cached_property
    def stores(self) -> tuple[CaseStore, ...]:
        """The cases of the site's hospitals: one, or all source domains of a pooled run.

        Builds the slice cache where it is missing, and writes `aliases.csv` and `problems.txt` to
        the site's folder.
        """
        data, cache = self.plan.data, resolve_cache(self.plan.site)
        sites = [open_site(self.root, name, data) for name in self.plan.hospitals_of(self.site)]
        sites = [only_inside_data_root(site, self.policy) for site in sites]
        heldout, salt = self.role != "train", alias_salt(self.policy)
        budget = budget_of(self.policy)
        stores = tuple(
            open_store(site, data, cache, heldout=heldout, salt=salt, budget=budget)
            for site in sites
        )
        write_text(self.home / "aliases.csv", aliases_table(stores))
        found = [
            *(problem for store in stores for problem in store.problems),
            *(note for s in sites for note in s.notes),
        ]
        write_text(self.home / "problems.txt", "\n".join(map(str, found)) or "none")
        return stores

    @cached_property
    def patients(self) -> NDArray[np.int64]:
        """Number of training patients of each class (K,), for the patient floor."""
        return patients_per_class(self.stores, self.plan.data.num_classes)

    @cached_property
    def distinct_pixels(self) -> NDArray[np.int64] | None:
        """Number of distinct training pixels of each class (K,), for the pixel floor.

        None unless the statistics count a pixel more than once (`prototypes.memory=online`).
        """
        if self.plan.prototypes.memory != "online":
            return None
        return pixels_per_class(self.stores, self.plan.data.num_classes)

    @property
    def state(self) -> LocalState:
        """The site's own training state in this run."""
        return LocalState.of(self.home, self.identity)

    def public_problems(self) -> list[dict[str, str]]:
        """Return the problems of the site's cases as codes and aliases, which may leave the site.

        A case that could not be read has no alias, since an alias needs the image
        (`clients.data.store`).
        """
        found = []
        for store in self.stores:
            alias = {case.name: case.alias for case in store.cases}
            found += [
                {"code": problem.code, "case": alias.get(problem.where, "")}
                for problem in store.problems
            ]
        return found


def handle(
    work: Callable[[SiteRequest], RecordDict],
    message: Message,
    context: Context,
    tree: Mapping[str, Any] | None,
) -> RecordDict:
    """Handle one message; any exception becomes a reply that holds only an error code.

    Args:
        work: The handler.
        message: The received message.
        context: Flower's context: node config and run config.
        tree: Resolved settings; if None, they are read from the run config.
    """
    identity = UNKNOWN_IDENTITY
    site, home = "", None
    kind = str(message.metadata.message_type)
    try:
        identity = identity_of(message.content)
        if policy := policy_of(context.node_config):
            site, home = policy.site, Path(policy.home)
            check_approved(policy)
        requested = plan_of_run(tree, dict(context.run_config), context.run_id)
        plan = apply_policy(requested, policy)
        root = ensure_data(plan.data, plan.site.cache)
        site = site_of(plan, root, context.node_config | ({"site": policy.site} if policy else {}))
        home = site_home(plan, site)
        request = decode_request(message.content, request_sizes(plan))
        check_identity(request.identity, requested)
        return work(SiteRequest(request, plan, site, root, home, kind, policy))
    except Exception as error:
        log_exception(home, kind, identity)
        if isinstance(error, FedsgcgError):
            code = error.public()
        elif out_of_memory(error):
            code = "SITE-502"
        else:
            code = "SITE-500"
        note = str(error) if code.startswith("POL") else ""
        return release_error(code, identity, site, home, kind, note=note)


def require_role(task: SiteRequest, *allowed: str) -> None:
    """Refuse a request that the site's role in this fold or the site's own settings forbid.

    Raises:
        FedsgcgError: ROL-201.
    """
    accepted = task.plan.site.roles
    if task.role not in allowed or task.role not in accepted:
        raise fail(
            "ROL-201",
            where=task.site,
            found=f"{task.kind} request to a site whose role is {task.role}",
            expected=f"a role among {list(allowed)} that the site accepts ({list(accepted)})",
        )


def check_identity(identity: Identity, plan: Plan) -> None:
    """Check that the request belongs to this site's plan and fold.

    Raises:
        FedsgcgError: PAY-120 when the request belongs to another plan or fold.
    """
    expected = (plan.digest(), plan.heldout)
    if (identity.plan, identity.heldout) != expected:
        raise fail(
            "PAY-120",
            found=f"plan {identity.plan[:12]}, held out {identity.heldout!r}",
            expected=f"plan {expected[0][:12]}, held out {expected[1]!r}",
            action="start coordinator and sites with the same settings",
        )


def site_of(plan: Plan, root: Path, node_config: Mapping[str, Any]) -> str:
    """Return the name of this node's site.

    It is `site` of the node config or, in a simulation, the k-th of the sorted names for partition
    k.

    Raises:
        FedsgcgError: DAT-101 when the node config names no site.
    """
    names = list(plan.members()) or sorted(discover_sites(root))
    if name := str(node_config.get("site", "")):
        if name not in names:
            raise fail(
                "DAT-101",
                found=f"site {name!r}",
                expected=f"one of {names}",
                action="Correct the node config.",
            )
        return name
    number = node_config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise fail(
            "DAT-101",
            found=f"partition {number} of {len(names)} sites",
            expected="site='name' or the partition-id of a site in the node config",
        )
    return names[number]


def site_home(plan: Plan, site: str) -> Path:
    """Return the site's own folder.

    It is `site.home` with {site} replaced or, without that setting, a folder inside the run's
    output.
    """
    if plan.site.home:
        return expand(plan.site.home.replace("{site}", site), "site.home")
    return Path(plan.output) / "sites" / site


def aliases_table(stores: Sequence[CaseStore]) -> str:
    """Return the case behind each alias as CSV (alias, case)."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["alias", "case"])
    table.writerows([case.alias, case.name] for store in stores for case in store.cases)
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a file of the site's folder atomically; a file with the same content is left untouched.

    Raises:
        FedsgcgError: SITE-501 when the site's folder cannot be written.
    """
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        expected = "a writable site folder"
        raise fail("SITE-501", where=str(path), found=str(error), expected=expected) from error
