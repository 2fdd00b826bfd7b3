"""The plan: every setting that decides the outcome of a federation, typed, checked and hashed.

Coordinator and hospitals must have exactly the same plan; its `digest` is part of every message.
Folders and devices are settings of a site alone (`SiteSettings`) and not part of the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, NamedTuple

from fedsgcg.common.names import MAX_CLASSES
from fedsgcg.common.settings.adaptation import AMPLITUDE, BATCHNORM, PROTOTYPES, AdaptSettings
from fedsgcg.common.settings.base import Checks, Section
from fedsgcg.common.settings.build import build
from fedsgcg.common.settings.data import AugmentationSettings, DataSettings
from fedsgcg.common.settings.federation import (
    POOLED,
    SHARES,
    TRAINING,
    FederationSettings,
    SiteSettings,
)
from fedsgcg.common.settings.privacy import PrivacySettings
from fedsgcg.common.settings.training import (
    DOMAINS,
    METHOD_NAMES,
    NETWORK_NAMES,
    MethodSettings,
    NetworkSettings,
    PrototypeSettings,
    RamSettings,
    SegClrSettings,
)

__all__ = [
    "METHOD_NAMES",
    "NETWORK_NAMES",
    "POOLED",
    "SHARES",
    "AugmentationSettings",
    "DataSettings",
    "FederationSettings",
    "MethodSettings",
    "NetworkSettings",
    "Plan",
    "PrivacySettings",
    "PrototypeSettings",
    "RamSettings",
    "SegClrSettings",
    "SiteSettings",
    "Terms",
]


NOT_DECISIVE: Final = (
    *("site", "run", "output", "label", "setting", "chosen"),
    *("budget", "planned_steps", "planned_slices"),
)
"""Fields of a plan that do not affect the outcome, or only repeat other settings."""


class Terms(NamedTuple):
    """The terms of the loss in a site's round.

    Attributes:
        supervised: Whether the slices' labels are used.
        contrastive: Whether pairs of images without labels are used.
    """

    supervised: bool
    contrastive: bool


ALONE: Final = {
    "moon": "the previous model of a client alone is the one it receives",
    "dofe": "its pool has a place for each client, and a client alone fills only one",
}
"""Method -> why it needs several clients."""
USES: Final = {"contrast": "unlabelled", "leave_out": "observer", "labels": "train"}
"""`method.unlabelled` -> role of the hospitals without labels."""
SGCG: Final = ("sgcg", "ram_sgcg")
SGCG_NAMES: Final = " or ".join(SGCG)
PER_SITE: Final = ("restart", "lagged", "cumulative", "discount")
"""Values of `prototypes.memory` with which the coordinator has constant statistics of each site."""
MOST_INPUTS: Final = 16_384
"""Most inputs of the first fully connected layer of SegCLR's projection head."""


@dataclass(frozen=True)
class Plan(Section):
    """The settings of one federation, i.e. of one cell of a study.

    Attributes:
        seed: The study's seed; every random stream is derived from it (`common.seeding`).
        heldout: The hospital that takes no part in training; "" trains on all.
        observers: Hospitals that receive the final model and are evaluated, but neither train nor
            count as held out.
        unlabelled: Hospitals that train without their masks, which are never read
            (docs/explanation/segclr.md); what a method does with them is `method.unlabelled`.
        run: Identifier of the run, part of every payload.
        output: The cell's folder on the coordinator.
        label: Name of this federation in tables; "" = the method's name.
        setting: What the study varies here besides method, held-out hospital and seed, e.g.
            `prototypes.weight=0.5`.
        chosen: Settings that this fold's source hospitals chose (`select`), in the same form.
        budget: What the cells of a study have in common, so that pooled, local and federated
            training can be compared: the number of `rounds` and passes; the `steps` that the
            optimiser takes one after the other, in a federation at the hospital with most of them;
            or the `slices` that all hospitals together train on. The measure is the federation of
            all training hospitals with these settings; `pooled` and `local` get as many steps per
            round as match it.
        planned_steps: Steps one after the other over all rounds, derived from the budget before
            training; 0 if the budget is the number of rounds.
        planned_slices: Slices that all hospitals train on over all rounds, likewise.
        adapt: Further evaluations, adapted to the held-out hospital's own images.
    """

    data: DataSettings
    network: NetworkSettings
    method: MethodSettings
    federation: FederationSettings
    prototypes: PrototypeSettings
    privacy: PrivacySettings
    site: SiteSettings
    seed: int = 0
    heldout: str = ""
    observers: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    run: str = "run"
    output: str = "runs"
    label: str = ""
    setting: str = ""
    chosen: str = ""
    budget: Literal["rounds", "steps", "slices"] = "rounds"
    planned_steps: int = 0
    planned_slices: int = 0
    adapt: AdaptSettings = field(default_factory=AdaptSettings)

    def checks(self) -> Checks:
        """The sections are compatible with each other."""
        mixed = not self.method.contrasts or "ram" not in self.prototypes.views or self.method.mixes
        yield mixed, "prototypes.views", "[source]: the view ram needs method=ram_sgcg"
        styled = "style" not in self.prototypes.views or self.method.name in SGCG
        yield styled or not self.method.contrasts, "prototypes.views", f"style with {SGCG_NAMES}"
        yield from self._shift_checks()
        yield from self._adapt_checks()
        restores = self.method.restores
        expected = "0 with a network by import path: the restoration decoder belongs to the U-Net"
        yield not (restores and self.network.is_own), "method.ram.restoration", expected
        pooled = self.federation.ownership == "pooled"
        yield from self._segclr_checks()
        yield (
            not (pooled and self.method.mixes) or self.method.ram.sharing == "local",
            "method.ram.sharing",
            "local with federation=pooled",
        )
        expected = "by_site: the hospital of an upper bound is also tested, which a pool is not"
        bound = bool(self.unlabelled) and self.method.unlabelled == "labels"
        yield not (pooled and bound), "federation.ownership", expected
        yield from self._method_fits()
        subtracts = self.prototypes.memory in ("overlay", "online")
        own_part = subtracts and self.prototypes.weighting != "pixels"
        trims = subtracts and self.prototypes.trimmed > 0
        expected = f"0 with memory={self.prototypes.memory}, which subtracts a site's own sums"
        yield not trims, "prototypes.trimmed", expected
        expected = f"pixels with memory={self.prototypes.memory}, which subtracts a site's own sums"
        yield not own_part, "prototypes.weighting", expected

    def _shift_checks(self) -> Checks:
        """The coordinator has the statistics of each site where a method needs their differences.

        A sum over all sites does not contain them.
        """
        if not self.shift:
            return
        name = "method.isda.covariance" if self.method.name == "isda" else "method.sgcg"
        if self.shift == "others":
            name = "method.segclr.global_negatives"
            whole = self.prototypes.shared == "full"
            yield whole, "prototypes.shared", f"full with {name}: block means are those of classes"
        expected = f"by_site with {name}: a client that owns all domains sends only their sum"
        yield self.federation.ownership == "by_site", "federation.ownership", expected
        kept = self.prototypes.memory in PER_SITE
        expected = f"{' | '.join(PER_SITE)} with {name}: with {self.prototypes.memory} there are "
        expected += "only sums over the sites, or the site changes its part during the round"
        yield kept, "prototypes.memory", expected
        counts = self.trains if self.shift == "others" else self.validates
        known = sum(counts(site) for site in self.data.sites)
        several = not self.data.sites or known >= 2
        yield several, "data.sites", f"two or more training hospitals with {name}"
        few = self.shift == "others" or known * self.data.num_classes <= MAX_CLASSES
        yield few, "data.sites", f"at most {MAX_CLASSES} classes of all hospitals with {name}"

    def _adapt_checks(self) -> Checks:
        """The model has what is adapted."""
        ways, where = self.adapt.by, "adapt.by"
        has_norm = BATCHNORM not in ways or self.network.norm == "batch"
        yield has_norm, where, f"no batchnorm with network.norm={self.network.norm}: it has none"
        known = self.method.statistics and not self.method.describes_projections
        described = PROTOTYPES not in ways or known
        yield described, where, f"no prototypes with {self.method.name}: set method.statistics=true"
        known = self.method.name == "harmofl" and self.method.ram.sharing == "summary"
        expected = "no amplitude without method=harmofl method.ram.sharing=summary, whose mean "
        expected += "amplitude the coordinator has"
        yield AMPLITUDE not in ways or known, where, expected

    def _segclr_checks(self) -> Checks:
        segclr, side = self.method.segclr, self.data.image_size // 16
        if not self.method.pairs or self.method.is_own:
            return
        expected = "unet: the projection head reads the encoder's deepest map"
        yield not self.network.is_own, "network.name", expected
        deepest = 16 * self.network.base_width
        expected = f"at most {deepest}, the channels of the deepest map (16 network.base_width)"
        narrow = segclr.head == "pool" or segclr.head_channels <= deepest
        yield narrow, "method.segclr.head_channels", expected
        inputs = segclr.head_channels * side**2
        expected = f"at most {MOST_INPUTS // max(side, 1) ** 2} with data.image_size="
        expected += f"{self.data.image_size}: the head has {side} x {side} positions"
        fits = segclr.head == "pool" or inputs <= MOST_INPUTS
        yield fits, "method.segclr.head_channels", expected

    def _method_fits(self) -> Checks:
        """The method has what it needs: maps, other clients, the right amplitudes."""
        name, features = self.method.name, self.network.features
        reads_head = name != "isda" or features == "penultimate"
        yield reads_head, "network.features", "penultimate with isda, which augments its features"
        fits = not (name in SGCG and self.method.sgcg.recalibration)
        expected = "0 without the U-Net's penultimate map: the output layer reads other features"
        reads = features == "penultimate" and not self.network.is_own
        yield fits or reads, "method.sgcg.recalibration", expected
        at_boundary = name not in ("elcfs", "saml") or features != "bottleneck"
        expected = f"a map of full resolution with {name}, which reads features at boundaries"
        yield at_boundary, "network.features", expected
        inside = name in ("isda", "mixstyle", "dsu", "trid") and self.network.is_own
        yield (
            not inside,
            "network.name",
            f"a built-in network with {name}, which changes its layers",
        )
        alone = name in ALONE and self.federation.ownership != "by_site"
        yield not alone, "federation.ownership", f"by_site with {name}: {ALONE.get(name, '')}"
        yield from self._dofe_checks()
        one_mean = name != "harmofl" or self.method.ram.sharing != "bank"
        yield one_mean, "method.ram.sharing", "local | summary with harmofl, which uses their mean"

    def _dofe_checks(self) -> Checks:
        pools = self.method.name == "dofe"
        places, features = self.network.domains, self.network.features
        yield places == (DOMAINS if pools else 0), "network.domains", "no value: it follows"
        if pools:
            known = features == "penultimate" and not self.network.is_own
            expected = "the U-Net's penultimate map with dofe, which adds domain knowledge to it"
            yield known, "network.features", expected
            expected = "another memory than momentum with dofe, whose pool has a part per hospital"
            yield self.prototypes.memory != "momentum", "prototypes.memory", expected
            few = len(self.data.sites) <= DOMAINS
            yield (
                few,
                "data.sites",
                f"at most {DOMAINS} hospitals with dofe, the places of its pool",
            )

    @property
    def described(self) -> tuple[str, ...]:
        """Names of the classes of a site's statistics.

        The classes of its pixels, or one class of all projections of its slices.
        """
        return ("projections",) if self.method.describes_projections else tuple(self.data.classes)

    @property
    def described_shape(self) -> tuple[int, int]:
        """(K, A) of a site's statistics."""
        if self.method.describes_projections:
            return 1, self.method.segclr.projection
        return self.data.num_classes, self.network.num_features

    @property
    def shift(self) -> Literal["", "between", "sites", "others"]:
        """What a site receives of the differences between sites, besides the global prototypes.

        `between`: the covariance of the sites' means. `sites`: the statistics of each site.
        `others`: the merged statistics of all other sites, in place of the prototypes.
        """
        if self.method.describes_projections:
            return "others"
        if self.method.name in SGCG and self.method.sgcg.sites:
            return "sites"
        penalty = self.method.name in SGCG and self.method.sgcg.between > 0
        noise = self.method.name == "isda" and self.method.isda.covariance == "between"
        return "between" if penalty or noise else ""

    @property
    def unit_features(self) -> bool:
        """Whether class statistics describe features of unit length."""
        if self.method.describes_projections:
            return True  # the loss has their cosines
        return self.prototypes.normalize and not self.method.raw

    def members(self) -> tuple[str, ...]:
        """Return the names of the sites of this federation; empty if any hospital may join."""
        if self.federation.ownership != "pooled":
            return tuple(sorted(self.data.sites))
        apart = {name for name in self.unlabelled if self.role(name) != "train"}
        return tuple(sorted({POOLED, self.heldout, *self.observers, *apart} - {""}))

    def hospitals_of(self, site: str) -> tuple[str, ...]:
        """Return the hospitals whose data a site owns: itself, or all source domains if pooled."""
        if self.federation.ownership != "pooled" or site != POOLED:
            return (site,)
        return tuple(name for name in sorted(self.data.sites) if self.role(name) == "train")

    @property
    def trained_on(self) -> str:
        """The one hospital that trains with `ownership=local`, "" otherwise."""
        alone = [site for site in self.data.sites if self.role(site) == "train"]
        return alone[0] if self.federation.ownership == "local" and len(alone) == 1 else ""

    @property
    def recalibrates(self) -> bool:
        """Whether BatchNorm's moments are measured again after every merge."""
        return self.federation.norm_policy == "recalibrate" and self.network.norm == "batch"

    @property
    def described_after_merge(self) -> bool:
        """Whether class statistics for `memory=restart` come with BatchNorm's moments."""
        shared_pass = self.prototypes.memory == "restart" and self.prototypes.norm_mode == "batch"
        classes = self.method.statistics and not self.method.describes_projections
        return classes and self.recalibrates and shared_pass

    def described_before(self, number: int) -> bool:
        """Whether class statistics of the received model are requested before round `number`.

        Never in round 1, whose model is untrained, nor for a round that does not use them.
        """
        restarts = self.method.statistics and self.prototypes.memory == "restart"
        if self.method.describes_projections and not self.terms(number).contrastive:
            return False
        return restarts and number > 1 and not self.described_after_merge

    def described_in_training(self, number: int) -> bool:
        """Whether class statistics of the received model come with the reply to `train`."""
        return (
            self.method.statistics
            and number > 1
            and self.prototypes.memory not in ("restart", "online")
        )

    def role(self, site: str) -> str:
        """Return `train`, `unlabelled`, `heldout` or `observer` for a site of this fold."""
        if site == self.heldout:
            return "heldout"
        if site in self.observers:
            return "observer"
        if site in self.unlabelled:
            return USES.get(self.method.unlabelled, "unlabelled")
        return "train"

    def trains(self, site: str) -> bool:
        """Whether a site of this fold trains, with or without its masks."""
        return self.role(site) in TRAINING

    def validates(self, site: str) -> bool:
        """Whether a site has validation cases: it trains and is none of `unlabelled`."""
        return self.role(site) == "train" and site not in self.unlabelled

    def hides_masks(self, site: str) -> bool:
        """Whether only the masks of a hospital's test cases may be read."""
        return site in self.unlabelled and self.role(site) in ("unlabelled", "observer")

    @property
    def pretraining_rounds(self) -> int:
        """Rounds with the contrastive term alone, before those with the supervised term alone."""
        share = self.method.segclr.pretraining if self.method.pairs else 0.0
        return max(1, round(share * self.federation.rounds)) if share else 0

    def terms(self, number: int, *, labelled: bool = True) -> Terms:
        """Return the terms of the loss in a round at a site with or without labels."""
        if not self.pretraining_rounds:
            return Terms(labelled, self.method.pairs)
        pretrains = number <= self.pretraining_rounds
        return Terms(labelled and not pretrains, pretrains)

    def digest(self) -> str:
        """Return the SHA-256 of all settings that decide the outcome (all but `NOT_DECISIVE`)."""
        tree = asdict(self)
        for name in NOT_DECISIVE:
            tree.pop(name)
        tree["data"].pop("root")
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def to_tree(self) -> dict[str, Any]:
        """Return the plan as plain dictionaries, as `config-json` carries it."""
        tree: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return tree

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Plan:
        """Build a plan from plain dictionaries; raises CFG-001 with all problems."""
        names = {field.name for field in fields(cls)}
        return build(cls, {name: value for name, value in tree.items() if name in names})
