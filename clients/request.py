"""Handling one message at a site: its settings, its role and the conversion of errors to codes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray

from fedsgcg.clients.data.case_files import (
    Site,
    discover_sites,
    ensure_data,
    open_site,
    resolve_cache,
)
from fedsgcg.clients.data.facts import read_facts
from fedsgcg.clients.data.store import CaseStore, fingerprint, open_store
from fedsgcg.clients.device import choose_device
from fedsgcg.clients.guard.approval import check_approved
from fedsgcg.clients.guard.budget import Budget, Charge, charge, require_affordable
from fedsgcg.clients.guard.egress import (
    LEDGER,
    UNKNOWN_IDENTITY,
    identity_of,
    log_exception,
    release_error,
)
from fedsgcg.clients.guard.ledger import take_receipt
from fedsgcg.clients.guard.limits import budget_of
from fedsgcg.clients.guard.pinned import check_pinned
from fedsgcg.clients.guard.policy import apply_policy, only_inside_data_root, policy_of
from fedsgcg.clients.guard.releases import (
    EVALUATION,
    TRAINING,
    Sample,
    class_kind,
    members_of,
    refused_sample,
    remember,
    sample_key,
    spend,
)
from fedsgcg.clients.guard.secure_sums import SiteSums
from fedsgcg.clients.guard.site_file import CASE_CONSENT, SiteFile
from fedsgcg.clients.guard.site_secret import alias_salt, data_salt, split_salt, study_of
from fedsgcg.clients.local_state import LocalState
from fedsgcg.clients.methods.class_statistics import (
    cases_of_classes,
    patients_per_class,
    pixels_per_class,
)
from fedsgcg.clients.methods.private_statistics import patients_of
from fedsgcg.clients.methods.projections import training_patients, training_slices
from fedsgcg.clients.out_of_memory import out_of_memory
from fedsgcg.common.differential_privacy.accounting import Spending
from fedsgcg.common.differential_privacy.noise import Noise
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.files.system import expand
from fedsgcg.common.image_summary import summarise
from fedsgcg.common.images.contents import IMAGE_SUMMARY
from fedsgcg.common.settings.data import SPLITS
from fedsgcg.common.settings.dp_rules import dp_problems, planned
from fedsgcg.common.settings.flower_run import plan_of_run
from fedsgcg.common.settings.message_sizes import request_sizes
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.privacy import PrivacySettings
from fedsgcg.common.wire.messages import Request, decode_request
from fedsgcg.common.wire.payload import Identity
from fedsgcg.common.wire.receipts import Receipt


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
        """`train`, `unlabelled`, `heldout` or `observer` in this fold."""
        return self.plan.role(self.site)

    @cached_property
    def device(self) -> torch.device:
        """Device of this site; raises CFG-004 when the requested device is unavailable."""
        return choose_device(self.plan.site.device, self.plan.site.threads)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The files of the site's hospitals, as far as they are inside its data folder."""
        masks = not self.plan.hides_masks(self.site)
        names = self.plan.hospitals_of(self.site)
        found = [open_site(self.root, name, self.plan.data, masks=masks) for name in names]
        return tuple(only_inside_data_root(site, self.policy) for site in found)

    @cached_property
    def stores(self) -> tuple[CaseStore, ...]:
        """The cases of the site's hospitals: one, or all source domains of a pooled run.

        Builds the slice cache where it is missing, and writes `aliases.csv` and `problems.txt` to
        the site's folder.
        """
        data, cache = self.plan.data, resolve_cache(self.plan.site)
        masks, target = not self.plan.hides_masks(self.site), self.site in self.plan.unlabelled
        salt = alias_salt(self.policy, study_of(self.plan.run))
        stores = tuple(
            open_store(
                site,
                data,
                cache,
                heldout=not (self.plan.trains(self.site) or target),
                salt=salt,
                split_salt=split_salt(self.policy),
                budget=budget_of(self.policy),
                target=target,
                masks=masks,
            )
            for site in self.sites
        )
        write_text(self.home / "aliases.csv", aliases_table(stores, self.home / "aliases.csv"))
        found = [
            *(problem for store in stores for problem in store.problems),
            *(note for site in self.sites for note in site.notes),
        ]
        write_text(self.home / "problems.txt", "\n".join(map(str, found)) or "none")
        return stores

    @cached_property
    def patients(self) -> NDArray[np.int64]:
        """Number of training patients of each class (K,), for the patient floor.

        A class whose patients differ too little from those of an earlier release counts none.
        """
        if self.plan.method.describes_projections:
            return np.where(
                self.accepts([self._sample("train")]), training_patients(self.stores), 0
            )
        counts = patients_per_class(self.stores, self.plan.data.num_classes)
        return np.where(self.accepts(self._class_samples()), counts, 0)

    def image_summary(self) -> dict[str, Any] | None:
        """Return the summary of the training images, None if it may not leave.

        A simulation needs none: its study plans before the start (`deploy.study.planned`).
        """
        consents = self.policy is not None and IMAGE_SUMMARY in self.policy.sharing
        if not consents or not self.plan.trains(self.site):
            return None
        training = {
            case.name for store in self.stores for case in store.cases if case.split == "train"
        }
        cases = tuple(case for site in self.sites for case in site.cases if case.name in training)
        facts = read_facts(replace(self.sites[0], cases=cases), resolve_cache(self.plan.site))
        found = summarise(facts, self.floor)
        return found.as_dict() if found else None

    @property
    def floor(self) -> int:
        """Fewest patients that a release covers: the site's own floor, 1 in a simulation."""
        return self.policy.patient_floor if self.policy else 1

    @cached_property
    def validates(self) -> bool:
        """Whether results of the site's validation cases may leave; they need enough patients.

        A hospital of the setting `unlabelled` validates nothing, and none does with differential
        privacy: a score has no noise.
        """
        return (
            not self.plan.privacy.dp.channels
            and self.site not in self.plan.unlabelled
            and self.accepts([self._sample("validation")])[0]
        )

    def shares_cases(self, split: str) -> bool:
        """Whether the results of single cases of a split may leave."""
        return self.policy is None or CASE_CONSENT[split] in self.policy.sharing

    def require_sample(self, split: str) -> None:
        """Refuse a release that covers, or differs from earlier ones by, too few patients.

        Raises:
            FedsgcgError: POL-720.
        """
        if not self.accepts([self._sample(split)])[0]:
            raise refused_sample(split, self.floor)

    def spend(self, kind: str) -> None:
        """Count this message against the site's budget of `releases` or `evaluations`.

        Raises:
            FedsgcgError: POL-721 when the budget is spent.
        """
        if self.policy is None:
            return
        spend(self.home, kind, self._request_digest, getattr(self.policy, kind))

    @cached_property
    def _request_digest(self) -> str:
        weights = self.request.weights.digest() if self.request.weights is not None else ""
        facts = [self.identity.encode(), self.kind, self.request.options, weights]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def budget(self) -> Budget:
        """The privacy budget: the site's own, or the plan's if the site has none."""
        if self.policy is not None and self.policy.dp_epsilon:
            return Budget(self.policy.dp_epsilon, self.policy.dp_delta)
        return Budget(self.plan.privacy.dp.epsilon, self.plan.privacy.dp.delta)

    def charge(self, channel: str, spending: Spending) -> tuple[Noise, float]:
        """Record a release with noise in the budget file, before any of the work.

        Returns:
            The noise of this release, and epsilon of everything that this site has released.

        Raises:
            FedsgcgError: PRV-975 when the budget is spent, SITE-501.
        """
        seeded = self.plan.privacy.dp.noise == "seeded"
        request = Charge(channel, self._run, self._request_digest, spending, seeded)
        total = charge(self.home, request, self.budget)
        if not seeded:
            return Noise.from_entropy(), total
        names = (self.site, self.kind, self._request_digest, channel)
        return Noise.seeded(self.plan.seed, *names), total

    def require_budget(self) -> None:
        """Refuse a run with noise that the site's budget or its number of patients does not allow.

        Raises:
            FedsgcgError: PRV-973, PRV-974.
        """
        if not self.plan.privacy.dp.channels:
            return
        tables = [store.slices("train") for store in self.stores]
        patients = sum(1 for _ in patients_of(self.stores, tables))
        if self.budget.delta * patients >= 1:
            raise fail(
                "PRV-973",
                found=f"delta={self.budget.delta:g}",
                expected=f"less than {1 / patients:.2g}, one divided by the number of patients",
                action="lower privacy.dp.delta, or dp_delta in site.yaml",
            )
        require_affordable(self.home, self._run, planned(self.plan), self.budget)

    @property
    def _run(self) -> str:
        text = "\x1f".join([self.identity.run, self.identity.heldout, self.identity.plan])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def accepts(self, samples: Sequence[Sample]) -> list[bool]:
        """Return which samples the site may release; a simulation releases all."""
        if self.policy is None:
            return [True] * len(samples)
        return remember(self.home, samples, self.floor)

    def _sample(self, split: str) -> Sample:
        """Return the sample of a split's slices."""
        chosen = {
            (store.site, int(index))
            for store in self.stores
            for index in np.unique(store.slices(split).case_of)
        }
        kind = TRAINING if split == "train" else EVALUATION
        return Sample(kind, self._key(split), partial(self._members, chosen))

    def _class_samples(self) -> list[Sample]:
        """Return the sample of each class: the training slices in which it occurs."""
        data = self.plan.data
        cases = cases_of_classes(self.stores, data.num_classes)
        kinds = [class_kind(labels) for labels in data.classes.values()]
        return [
            Sample(kind, self._key(kind), partial(self._members, chosen))
            for kind, chosen in zip(kinds, cases, strict=True)
        ]

    def _members(self, chosen: Collection[tuple[str, int]]) -> frozenset[str]:
        return members_of(self.stores, chosen, data_salt(self.policy))

    def _key(self, part: str) -> str:
        return sample_key(self.stores, part, self.plan.data.train_slices, self.plan.data.structures)

    @property
    def floors(self) -> PrivacySettings:
        """The floors of the site's statistics.

        Projections are counted in slices instead of pixels, and there must be more slices than a
        projection has values: fewer span their own covariance, which would show them.
        """
        privacy = self.plan.privacy
        if not self.plan.method.describes_projections:
            return privacy
        return replace(privacy, min_pixels=self.plan.method.segclr.projection + 1)

    @cached_property
    def distinct_pixels(self) -> NDArray[np.int64] | None:
        """Number of distinct training pixels of each class (K,), for the pixel floor.

        None unless the statistics count a pixel more than once (`prototypes.memory=online`). Of
        projections, the number of distinct slices.
        """
        if self.plan.method.describes_projections:
            return training_slices(self.stores)
        if self.plan.prototypes.memory != "online":
            return None
        return pixels_per_class(self.stores, self.plan.data.num_classes)

    @property
    def key(self) -> Path | None:
        """File of the site's private key, which signs the head of the ledger; None if simulated."""
        return Path(self.policy.key) if self.policy else None

    @property
    def sums(self) -> SiteSums | None:
        """The site's part in the secure sum of this request; None in a plan without them."""
        if not self.plan.privacy.secure_sums.enabled:
            return None
        return SiteSums(self.site, self.home, self.plan, self.policy, self.request, self.kind)

    @property
    def state(self) -> LocalState:
        """The site's own training state in this run."""
        return LocalState.of(self.home, self.identity)

    def data_digest(self) -> str:
        """Return a digest of the site's data and splits, by which a change during a run is noticed.

        At a site with a policy it is keyed, so that nobody can check a guess about the data.
        """
        prints, salt = [fingerprint(store) for store in self.stores], data_salt(self.policy)
        if not salt:
            return " ".join(prints)
        return hashlib.blake2b("".join(prints).encode(), digest_size=8, key=salt).hexdigest()

    def public_counts(self) -> dict[str, dict[str, int | None]]:
        """Return the numbers of cases, patients and slices of each split, which may leave the site.

        None stands for a number that is suppressed, because its patients, or their difference from
        an earlier enrolment, are fewer than the floor; 0 is sent as 0.
        """
        counts: dict[str, dict[str, int | None]] = {"cases": {}, "patients": {}, "slices": {}}
        for split in SPLITS:
            cases = [case for store in self.stores for case in store.cases if case.split == split]
            shown = not cases or self.accepts([self._sample(split)])[0]
            for kind, number in (
                ("cases", len(cases)),
                ("patients", len({case.patient for case in cases})),
                ("slices", sum(len(store.slices(split)) for store in self.stores)),
            ):
                counts[kind][split] = number if shown else None
        return counts

    def public_problems(self) -> list[dict[str, Any]]:
        """Return the problems of the site's cases as codes, which may leave the site.

        Returns:
            In a simulation, `code` and `case` of every problem; a case that could not be read has
            no alias, since an alias needs the image (`clients.data.store`). At a site with a policy
            one `code` per problem without a case; a code with fewer problems than the floor appears
            once, as `suppressed`.
        """
        found = [(store, problem) for store in self.stores for problem in store.problems]
        if self.policy is None:
            alias = {
                (store.site, case.name): case.alias for store in self.stores for case in store.cases
            }
            return [
                {"code": problem.code, "case": alias.get((store.site, problem.where), "")}
                for store, problem in found
            ]
        numbers = sorted(Counter(problem.code for _, problem in found).items())
        entries: list[dict[str, Any]] = []
        for code, number in numbers:
            if number >= self.floor:
                entries += [{"code": code}] * number
            else:
                entries.append({"code": code, "suppressed": True})
        return entries


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
    site, home, key = "", None, None
    kind = str(message.metadata.message_type)
    try:
        identity = identity_of(message.content)
        if policy := policy_of(context.node_config):
            site, home, key = policy.site, Path(policy.home), Path(policy.key)
            check_approved(policy)
            if receipt := Receipt.of(message.content):
                take_receipt(receipt, home / LEDGER, Path(policy.ca))
        requested = plan_of_run(tree, dict(context.run_config), context.run_id)
        plan = apply_policy(requested, policy)
        if problems := list(dp_problems(requested)):
            raise FedsgcgError(*problems)
        root = ensure_data(plan.data, plan.site.cache)
        site = site_of(plan, root, context.node_config | ({"site": policy.site} if policy else {}))
        home = site_home(plan, site)
        request = decode_request(message.content, request_sizes(plan))
        check_identity(request.identity, requested)
        check_pinned(requested, policy)
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
        return release_error(code, identity, site, home, kind, note=note, key=key)


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


def aliases_table(stores: Sequence[CaseStore], known: Path) -> str:
    """Return the case behind each alias as CSV (alias, case).

    Args:
        stores: The cases.
        known: The table so far: aliases of other studies and earlier data are kept.
    """
    rows: dict[str, str] = {}
    if known.exists():
        with known.open(encoding="utf-8", newline="") as file:
            rows = {row["alias"]: row["case"] for row in csv.DictReader(file)}
    rows |= {case.alias: case.name for store in stores for case in store.cases}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["alias", "case"])
    table.writerows(rows.items())
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a file of the site's folder atomically; a file with the same content is left untouched.

    Raises:
        FedsgcgError: SITE-501 when the site's folder cannot be written.
    """
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        write_file(path, text.encode())
    except OSError as error:
        expected = "a writable site folder"
        raise fail("SITE-501", where=str(path), found=str(error), expected=expected) from error
