"""The plan: every setting that decides the outcome of a federation, typed, checked and hashed.

Coordinator and hospitals must agree on the plan to the letter; its `digest` travels with every message. Where files
lie and on which device a site computes is the site's own business (`SiteSettings`) and not part of the digest.
The defaults live in `configs/`; each field here and in `common.settings.data` and `common.settings.training` says what
it means, its unit, and why the default is what it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from common.settings.base import Checks, Section
from common.settings.data import AugmentationSettings, DataSettings
from common.settings.training import (
    METHOD_NAMES,
    NETWORK_NAMES,
    MethodSettings,
    NetworkSettings,
    PrototypeSettings,
    RamSettings,
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
    "SiteSettings",
]

SHARES = {"summary": "amplitude_summary", "bank": "amplitude_bank"}
POOLED = "pooled"  # the one site that owns every source domain with `federation=pooled`


@dataclass(frozen=True)
class FederationSettings(Section):
    """The round loop of the coordinator.

    Attributes:
        ownership: Who owns which source domain. `by_site`: every hospital is a client with its own data. `pooled`: one
            client owns all source domains, the papers' centralised setting. `local`: one hospital trains alone; a
            study makes one cell of each training hospital.
        moments: Adam's moments at the start of a round: `restart` at zero, or `keep` those of the site's round before,
            which makes a pooled run one uninterrupted training.
        rounds: Number of rounds.
        quorum: Training sites that must join and answer; 0 = all of them.
        join_deadline_s: Seconds to wait for sites at the start.
        round_deadline_s: Seconds to wait for the replies of a round (also of an evaluation).
        late: What becomes of a site that missed a round's deadline: `next_round` asks it again in the next round, so
            that each round may take its whole deadline; `drop` asks it no more in this call. A late reply never counts.
        weighting: FedAvg weights: `samples` = training slices of a site, `sites` = equal.
        norm_policy: BatchNorm's running moments in the merged model. `average` merges those that the sites measured
            under their local weights, like every other entry. `recalibrate` has every site measure them again under
            the merged weights, one pass over its augmented training slices, and pools them
            (`common.wire.norm_moments`).
        selection: Model that is evaluated at the held-out site: the `last`, or the best on `source_validation`.
        shared_images: What happens when an image of a training hospital is also at the held-out hospital or an observer
            (`server.sites.shared_images`): `refuse` ends the run before its first round, with the list; `flag` goes on,
            and the run ends as `degraded`.
        heldout_every: Also evaluate at the held-out site every so many rounds, for curves only; 0 = only at the end.
            The value never selects a model.
    """

    ownership: Literal["by_site", "pooled", "local"] = "by_site"
    moments: Literal["restart", "keep"] = "restart"
    rounds: int = 20
    quorum: int = 0
    join_deadline_s: float = 120.0
    round_deadline_s: float = 3600.0
    late: Literal["next_round", "drop"] = "next_round"
    weighting: Literal["samples", "sites"] = "samples"
    norm_policy: Literal["average", "recalibrate"] = "recalibrate"
    selection: Literal["last", "source_validation"] = "last"
    shared_images: Literal["refuse", "flag"] = "refuse"
    heldout_every: int = 0

    def checks(self) -> Checks:
        """Counts and deadlines are positive."""
        yield self.rounds >= 1, "rounds", "1 or more"
        yield self.quorum >= 0, "quorum", "0 (all) or more"
        yield self.join_deadline_s > 0, "join_deadline_s", "seconds, more than zero"
        yield self.round_deadline_s > 0, "round_deadline_s", "seconds, more than zero"
        yield self.heldout_every >= 0, "heldout_every", "0 or more"


@dataclass(frozen=True)
class PrivacySettings(Section):
    """What a site withholds. A site's own file may only make these stricter.

    Attributes:
        min_pixels: A class with fewer pixels at the site is withheld (sent as absent) (methods.md 1.12).
        min_patients: A class seen in fewer patients at the site is withheld.
    """

    min_pixels: int = 1000
    min_patients: int = 2

    def checks(self) -> Checks:
        """Floors are at least one."""
        yield self.min_pixels >= 1, "min_pixels", "1 or more"
        yield self.min_patients >= 1, "min_patients", "1 or more"


@dataclass(frozen=True)
class SiteSettings(Section):
    """What is a site's own business and never part of the plan's digest.

    Attributes:
        home: Folder of the site's ledger, error log and pictures; `{site}` is replaced by the site's name.
        cache: Folder of the slice cache; "" = $FEDSGCG_CACHE or ~/.cache/fedsgcg.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads of a training process; fixed, because the order of sums depends on it.
        roles: Roles this site accepts.
        shares: What the site agrees to send besides weights and class statistics (methods.md 2.8):
            `amplitude_summary`, per frequency the sums over the site's images of their log amplitudes and of the
            products of two channels' (means, variances and correlations, no phase); `amplitude_bank`, the amplitudes of
            single images. In a simulation one setting consents for all hospitals; a site's own file beats it.
        micro_batches: Parts into which a step is cut where the memory does not hold it; a site that runs out of memory
            takes more by itself. Gradients are accumulated: the effective batch is the same, but BatchNorm and the Dice
            term, which look at a whole batch, see the parts.
        feature_samples: Pixels of each class whose features the site keeps for the report's t-SNE (`features.arrow` in
            the site's folder, which only a simulation's report can read); 0 keeps none.
    """

    home: str
    cache: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    roles: tuple[str, ...] = ("train", "heldout", "observer")
    shares: tuple[str, ...] = ()
    micro_batches: int = 1
    feature_samples: int = 0

    def checks(self) -> Checks:
        """The roles are known ones."""
        yield self.threads >= 1, "threads", "1 or more"
        yield self.micro_batches >= 1, "micro_batches", "1 or more"
        yield 0 <= self.feature_samples <= 300, "feature_samples", "0 (none) to 300"
        yield set(self.shares) <= set(SHARES.values()), "shares", ", ".join(SHARES.values())
        yield set(self.roles) <= {"train", "heldout", "observer"}, "roles", "train, heldout, observer"


NOT_DECISIVE: Final = ("site", "run", "output", "label", "setting", "chosen")
"""Places and names in a plan: what they say of settings stands in the settings themselves."""


@dataclass(frozen=True)
class Plan(Section):
    """All of it, for one federation = one cell of a study.

    Attributes:
        seed: The study's seed; every random stream is derived from it (`common.seeding`).
        heldout: The hospital that takes no part in training; "" trains on all.
        observers: Sites that receive the final model and are evaluated, but neither train nor count as held out.
        run: Identifier of the run that every payload carries.
        output: The cell's folder on the coordinator.
        label: What tables call this federation; "" = the method's name.
        setting: What a study varies here besides method, held-out hospital and seed, e.g. `prototypes.weight=0.5`.
        chosen: Settings that were chosen for this fold by its source hospitals (`select`), likewise.
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
    run: str = "run"
    output: str = "runs"
    label: str = ""
    setting: str = ""
    chosen: str = ""

    def checks(self) -> Checks:
        """The parts go together."""
        mixed = not self.method.contrasts or "ram" not in self.prototypes.views or self.method.mixes
        yield mixed, "prototypes.views", "[source]: the view ram needs method=ram_sgcg"
        restores = self.method.mixes and self.method.ram.restoration > 0
        expected = "0 with a network by import path: the restoration decoder belongs to the U-Net"
        yield not (restores and self.network.is_own), "method.ram.restoration", expected
        pooled = self.federation.ownership == "pooled"
        yield not pooled or self.method.ram.sharing == "local", "method.ram.sharing", "local with federation=pooled"
        own_part = self.prototypes.memory in ("overlay", "online") and self.prototypes.weighting != "pixels"
        expected = f"pixels with memory={self.prototypes.memory}, which takes a site's own sums out again"
        yield not own_part, "prototypes.weighting", expected

    def members(self) -> tuple[str, ...]:
        """Names of the sites of this federation; empty where any hospital may come."""
        if self.federation.ownership != "pooled":
            return tuple(sorted(self.data.sites))
        return tuple(sorted({POOLED, self.heldout, *self.observers} - {""}))

    def hospitals_of(self, site: str) -> tuple[str, ...]:
        """Hospitals whose data a site owns: itself, or every source domain of a pooled run."""
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
        """Whether BatchNorm's moments are measured again after every merge; other norms have none."""
        return self.federation.norm_policy == "recalibrate" and self.network.norm == "batch"

    @property
    def described_after_merge(self) -> bool:
        """Whether the sites describe the merged model for `memory=restart` when they measure BatchNorm's moments."""
        shared_pass = self.prototypes.memory == "restart" and self.prototypes.norm_mode == "batch"
        return self.method.statistics and self.recalibrates and shared_pass

    def described_before(self, number: int) -> bool:
        """Whether class statistics of the received model are asked for before round `number` trains.

        Those of the untrained network, received in round 1, describe nothing and are never taken.
        """
        restarts = self.method.statistics and self.prototypes.memory == "restart"
        return restarts and number > 1 and not self.described_after_merge

    def described_in_training(self, number: int) -> bool:
        """Whether class statistics of the received model come with the answer to the training message of a round."""
        return self.method.statistics and number > 1 and self.prototypes.memory not in ("restart", "online")

    def role(self, site: str) -> str:
        """Return `train`, `heldout` or `observer` for a site of this fold."""
        if site == self.heldout:
            return "heldout"
        return "observer" if site in self.observers else "train"

    def digest(self) -> str:
        """SHA-256 of what decides the outcome: everything but places, devices and the run's name."""
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
        """Build a plan from plain dictionaries; raises one error with all problems."""
        from common.settings.build import build

        return build(cls, {name: tree[name] for name in tree if name in {field.name for field in fields(cls)}})
