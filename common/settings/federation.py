"""Settings of the federation: the round loop, the floors of privacy, and what is a site's own business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.settings.base import Checks, Section

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
        yield (
            set(self.roles) <= {"train", "heldout", "observer"},
            "roles",
            "train, heldout, observer",
        )
