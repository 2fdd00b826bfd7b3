"""Settings of the federation: the round loop, the privacy floors, and those of a site alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from fedsgcg.common.settings.aggregation import (
    AdaptiveSettings,
    Aggregator,
    FedAvgMSettings,
    FedCESettings,
    FedDGGASettings,
    FedProxSettings,
    KrumSettings,
    ScaffoldSettings,
)
from fedsgcg.common.settings.base import Checks, Section, at_most

Role = Literal["train", "unlabelled", "heldout", "observer"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
"""Roles of a site: it trains, trains without masks, is held out, or only evaluates the model."""
TRAINING: Final = ("train", "unlabelled")
"""Roles of the sites that train."""

SHARES = {"summary": "amplitude_summary", "bank": "amplitude_bank"}
SITE_STATISTICS: Final = "site_statistics"
"""Consent to class statistics being sent on to the other sites as those of one site."""
CONSENTS: Final = (*SHARES.values(), SITE_STATISTICS)
WEEK_S = 604_800.0
LIMITS: Final[Mapping[str, int]] = {"patients": 100_000, "slices": 1_000_000}
"""Most patients and slices of a site for which the coordinator states no own limits."""
ALL_SITES: Final = "all"
POOLED = "pooled"  # the site that owns all source domains with `federation=pooled`


@dataclass(frozen=True)
class FederationSettings(Section):
    """The round loop of the coordinator.

    Attributes:
        ownership: Who owns which source domain. `by_site`: every hospital is a client with its own
            data. `pooled`: one client owns all source domains, the papers' centralised setting.
            `local`: one hospital trains alone; a study makes one cell per training hospital.
        moments: Adam's moments at the start of a round: `restart` at zero, or `keep` those of the
            site's previous round, which makes a pooled run one uninterrupted training.
        rounds: Number of rounds.
        quorum: Training sites that must join and answer; 0 = all of them. A rejected answer counts
            as one; a round with fewer admitted answers than a number given here is void.
        join_deadline_s: Seconds to wait for sites at the start.
        round_deadline_s: Seconds to wait for the replies of a round (also of an evaluation).
        late: How to treat a site that missed a round's deadline: `next_round` asks it again in the
            next round, so that each round may take up to its deadline; `drop` does not ask it again
            in this run. A late reply never counts.
        limits: The most that a site can have, as the coordinator knows it: {North: {patients: 300,
            slices: 9000}}. A site that enrols with more is refused, and its weight and pixel counts
            are bounded by its slices. The name `all` is for every site without own numbers.
        screening: What to do with a reply that is valid by itself but far from those of the other
            sites or from the site's own first rounds (docs/explanation/reliability.md, "Screens"):
            `warn` lists it and the run ends as `degraded`; `reject` also leaves it out of the
            merge; `off` does not compare.
        aggregator: How the sites' models become the global model (docs/explanation/aggregation.md):
            `fedavg`, their weighted mean; `fedprox`, the same with a proximal term at the sites;
            `fedbn`, with BatchNorm of its own at each site; `fedavgm`, `fedadam`, `fedyogi`, an
            optimiser at the coordinator; `scaffold`, with control variates; `feddg_ga` and `fedce`,
            with weights from the sites' validation; `trimmed_mean`, without the `tolerated`
            smallest and largest values of each weight; `median` of each weight; `norm_clipping`,
            after shortening updates longer than `clip` times the median; `krum`, the model nearest
            to the others. With `norm_policy=recalibrate` BatchNorm's moments are pooled whatever
            the aggregator.
        fedprox: Settings of `aggregator=fedprox`.
        fedavgm: Settings of `aggregator=fedavgm`.
        fedadam: Settings of `aggregator=fedadam`.
        fedyogi: Settings of `aggregator=fedyogi`.
        scaffold: Settings of `aggregator=scaffold`.
        feddg_ga: Settings of `aggregator=feddg_ga`.
        fedce: Settings of `aggregator=fedce`.
        krum: Settings of `aggregator=krum`.
        tolerated: Sites that may be broken, for `trimmed_mean` (three sites or more are needed for
            one, five for two) and `krum` (five for one).
        clip: Longest update relative to the median of the updates' norms, for `norm_clipping`.
        weighting: FedAvg weights: `samples` = training slices of a site, `sites` = equal.
        codec: Form of the weights that a site sends. `none`: float32. `lossless`: their difference
            from the received weights, compressed without loss; the models are the same.
            `bf16`: that difference in 16 bits, compressed, with what rounding drops added to the
            site's next difference (docs/reference/messages.md).
        most_share: Largest share of one site in the weighted mean of the models and in the pooled
            BatchNorm moments; larger weights are lowered to it. 1 = no bound. A site near its
            `limits` can otherwise outweigh all others.
        norm_policy: BatchNorm's running moments in the merged model. `average` merges those that
            the sites measured under their local weights, like every other entry. `recalibrate`
            makes every site measure them again under the merged weights, in one pass over its
            augmented training slices, and pools them (`common.wire.norm_moments`).
        selection: Model to evaluate at the held-out hospital: the `last`, or the best on
            `source_validation`.
        ema: Decay per round of an exponential moving average of the global model, which the
            coordinator keeps; 0 = none. Training continues from the model itself. At the end the
            average is validated: with `selection=last` it is the model, with `source_validation`
            only if it is better than the best one. The first rounds have equal weights.
        shared_images: What to do if an image of a training hospital is also at the held-out
            hospital or an observer (`server.sites.shared_images`): `refuse` ends the run before its
            first round, with the list; `flag` continues, and the run ends as `degraded`.
        changed_data: What to do if a training hospital's files or splits change during the run:
            `warn` notes it, and the run ends as `degraded`; `stop` ends the run before the round is
            committed. The same command then continues, with the changed data.
        heldout_every: Interval in rounds of additional evaluations at the held-out hospital, for
            curves only; 0 = only at the end. They never select a model.
    """

    ownership: Literal["by_site", "pooled", "local"] = "by_site"
    moments: Literal["restart", "keep"] = "restart"
    rounds: int = at_most(100_000, 20)
    quorum: int = 0
    join_deadline_s: float = at_most(WEEK_S, 120.0)
    round_deadline_s: float = at_most(WEEK_S, 3600.0)
    late: Literal["next_round", "drop"] = "next_round"
    limits: dict[str, dict[str, int]] = field(default_factory=dict)
    screening: Literal["warn", "reject", "off"] = "warn"
    aggregator: Aggregator = "fedavg"
    fedprox: FedProxSettings = field(default_factory=FedProxSettings)
    fedavgm: FedAvgMSettings = field(default_factory=FedAvgMSettings)
    fedadam: AdaptiveSettings = field(default_factory=AdaptiveSettings)
    fedyogi: AdaptiveSettings = field(default_factory=AdaptiveSettings)
    scaffold: ScaffoldSettings = field(default_factory=ScaffoldSettings)
    feddg_ga: FedDGGASettings = field(default_factory=FedDGGASettings)
    fedce: FedCESettings = field(default_factory=FedCESettings)
    krum: KrumSettings = field(default_factory=KrumSettings)
    tolerated: int = 1
    clip: float = 2.0
    weighting: Literal["samples", "sites"] = "samples"
    codec: Literal["none", "lossless", "bf16"] = "none"
    most_share: float = 1.0
    norm_policy: Literal["average", "recalibrate"] = "recalibrate"
    selection: Literal["last", "source_validation"] = "last"
    ema: float = 0.0
    shared_images: Literal["refuse", "flag"] = "refuse"
    changed_data: Literal["warn", "stop"] = "warn"
    heldout_every: int = 0

    def checks(self) -> Checks:
        """Counts and deadlines are positive."""
        yield self.rounds >= 1, "rounds", "1 or more"
        yield self.quorum >= 0, "quorum", "0 (all) or more"
        yield self.join_deadline_s > 0, "join_deadline_s", "seconds, more than zero"
        yield self.round_deadline_s > 0, "round_deadline_s", "seconds, more than zero"
        yield self.tolerated >= 1, "tolerated", "1 or more"
        yield self.clip >= 1, "clip", "1 or more"
        yield 0 < self.most_share <= 1, "most_share", "above 0, at most 1 (no bound)"
        yield 0 <= self.ema < 1, "ema", "a fraction in [0, 1)"
        yield self.heldout_every >= 0, "heldout_every", "0 or more"
        yield from limit_checks(self.limits)

    def limit(self, site: str) -> dict[str, int]:
        """Return the most `patients` and `slices` that a site can have."""
        return {**LIMITS, **self.limits.get(ALL_SITES, {}), **self.limits.get(site, {})}


def limit_checks(limits: Mapping[str, Mapping[str, int]]) -> Checks:
    """Check that limits are known and positive."""
    entries = [entry for limit in limits.values() for entry in limit.items()]
    holds = all(name in LIMITS and number >= 1 for name, number in entries)
    yield holds, "limits", "patients and slices of a site, 1 or more each"


@dataclass(frozen=True)
class PrivacySettings(Section):
    """Privacy floors of the class statistics. A site's own file may only make them stricter.

    Attributes:
        min_pixels: A class with fewer pixels at the site is withheld (sent as absent).
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
    """Settings of a site alone, which are not part of the plan's digest.

    Attributes:
        home: Folder of the site's ledger, error log and pictures; `{site}` is replaced by the
            site's name.
        cache: Folder of the slice cache; "" = $FEDSGCG_CACHE or ~/.cache/fedsgcg.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads of a training process; fixed, because the order of sums depends on it.
        roles: Roles that this site accepts.
        shares: What the site agrees to send besides weights and class statistics:
            `amplitude_summary`, per frequency the sums over the site's images of log amplitudes and
            of products of two channels' log amplitudes (no phase); `amplitude_bank`, the amplitudes
            of single images; `site_statistics`, its class statistics to every other site, not only
            merged with theirs (`method.sgcg.sites`). In a simulation one setting consents for all
            hospitals; a site's own file takes precedence.
        micro_batches: Parts into which a step is split if it does not fit into memory; a site that
            runs out of memory increases it automatically. Gradients are accumulated, so that the
            effective batch is the same, but BatchNorm and the Dice term, which depend on the batch,
            are computed per part.
        feature_samples: Pixels per class whose features the site keeps for the report's t-SNE
            (`features.arrow` in the site's folder, which only a simulation's report reads); 0 =
            none.
    """

    home: str
    cache: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = at_most(1024, 1)
    roles: tuple[str, ...] = ROLES
    shares: tuple[str, ...] = ()
    micro_batches: int = at_most(4096, 1)
    feature_samples: int = 0

    def checks(self) -> Checks:
        """The roles are known ones."""
        yield self.threads >= 1, "threads", "1 or more"
        yield self.micro_batches >= 1, "micro_batches", "1 or more"
        yield 0 <= self.feature_samples <= 300, "feature_samples", "0 (none) to 300"
        yield set(self.shares) <= set(CONSENTS), "shares", ", ".join(CONSENTS)
        yield set(self.roles) <= set(ROLES), "roles", ", ".join(ROLES)
