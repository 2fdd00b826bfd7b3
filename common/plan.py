"""The plan: every setting that decides the outcome of a federation, typed, checked and hashed.

Coordinator and hospitals must agree on the plan to the letter; its `digest` travels with every message. Where files
lie and on which device a site computes is the site's own business (`SiteSettings`) and not part of the digest.
The defaults live in `configs/`; each field here says what it means, its unit, and why the default is what it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any, Literal

from common.errors import FedsgcgError, Problem

Checks = Iterator[tuple[bool, str, str]]
# The keys of `common.networks.NETWORKS` and `clients.methods.METHODS`, here because a plan is read without torch.
NETWORK_NAMES = ("unet",)
METHOD_NAMES = ("source", "ram", "sgcg", "ram_sgcg")
CONTRASTIVE = ("sgcg", "ram_sgcg")
MIXING = ("ram", "ram_sgcg")
SHARES = {"summary": "amplitude_summary", "bank": "amplitude_bank"}
POOLED = "pooled"  # the one site that owns every source domain with `federation=pooled`


class Section:
    """Base of all settings: a frozen dataclass whose `checks` are run when it is made.

    `checks` yields (holds, field, what was expected) and every failing one becomes a Problem, so that a reader sees all
    errors of a configuration at once.
    """

    def checks(self) -> Checks:
        """Yield (holds, field name, expectation) for every rule of this section."""
        yield from ()

    def __post_init__(self) -> None:
        wrong = [
            Problem("CFG-001", where=name, found=repr(attrgetter(name)(self)), expected=expected)
            for holds, name, expected in self.checks()
            if not holds
        ]
        if wrong:
            raise FedsgcgError(*wrong)


@dataclass(frozen=True)
class AugmentationSettings(Section):
    """Random changes of a training slice, drawn anew each time; zero switches one off.

    Attributes:
        flip: Probability of a left-right flip.
        rotate_degrees: Rotation, uniform in plus/minus this angle.
        scale: Relative change of size, uniform in [1 - scale, 1 + scale].
        shift: Shift as a fraction of the image side, uniform in plus/minus.
        gamma: Contrast exponent, exp(uniform(-gamma, gamma)) on the image scaled to [0, 1].
        brightness: Offset on the [-1, 1] scale, uniform in plus/minus.
        noise: Largest standard deviation of Gaussian noise on the [-1, 1] scale; drawn uniformly per slice.
        zoom: RAM-DSIR's augmentation (methods.md 2.3): with probability one half each side is enlarged by a factor of
            its own, uniform in [1, 1 + zoom], and a random window of the image's size is kept.
    """

    flip: float = 0.0
    rotate_degrees: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    gamma: float = 0.0
    brightness: float = 0.0
    noise: float = 0.0
    zoom: float = 0.0

    def checks(self) -> Checks:
        """Every amount is zero or more; probabilities and relative amounts stay below one."""
        yield 0 <= self.flip <= 1, "flip", "a probability in [0, 1]"
        yield 0 <= self.rotate_degrees <= 180, "rotate_degrees", "degrees in [0, 180]"
        yield 0 <= self.scale < 1, "scale", "a fraction in [0, 1)"
        yield 0 <= self.shift < 1, "shift", "a fraction in [0, 1)"
        for name in ("gamma", "brightness", "noise", "zoom"):
            yield getattr(self, name) >= 0, name, "zero or more"


@dataclass(frozen=True)
class DataSettings(Section):
    """Which images, which classes, and how a file becomes a training slice.

    Attributes:
        name: Short name of the data set, for folders and reports.
        root: Folder with `manifest.csv` or one folder a site. "" makes the synthetic hospitals.
        sites: The hospitals that take part; empty means all that the root holds.
        classes: Class name -> raw label values, background first. Exclusive: every declared value in one class.
        structures: Reported structure -> the classes that make it up (nested structures share classes).
        image_size: Side in pixels of the square training slice (height = width).
        stack: 3 = slices z-1, z, z+1 of a volume as channels; 1 = the slice alone, repeated.
        intensity: Scaling of a volume to [-1, 1]: `percentile` (1st to 99th), `minmax`, or `zscore` (three standard
            deviations map to 1).
        activation: `softmax` over exclusive classes or one `sigmoid` per structure (methods.md 2.6).
        threshold: Probability above which a sigmoid structure is set; unused with softmax, where the largest wins.
        spacing_unit: `mm` reports surface distances in millimetres too; `pixel` where the spacing is not real.
        largest_component: Keep only the largest connected component of each predicted structure.
        fill_holes: Fill holes of each predicted structure.
        train_slices: `all`, or `foreground` = only slices that hold a declared structure.
        validation_fraction: Share of a source site's patients kept for source validation.
        augmentation: Random changes of training slices.
    """

    name: str
    root: str
    classes: dict[str, list[int]]
    structures: dict[str, list[str]]
    sites: list[str]
    image_size: int = 128
    stack: int = 3
    intensity: Literal["percentile", "minmax", "zscore"] = "percentile"
    activation: Literal["softmax", "sigmoid"] = "softmax"
    threshold: float = 0.5
    spacing_unit: Literal["mm", "pixel"] = "mm"
    largest_component: bool = True
    fill_holes: bool = True
    train_slices: Literal["all", "foreground"] = "all"
    validation_fraction: float = 0.2
    augmentation: AugmentationSettings = AugmentationSettings()

    def checks(self) -> Checks:
        """Classes are exclusive, structures are made of classes, sizes fit the network."""
        values = [value for group in self.classes.values() for value in group]
        yield len(self.classes) >= 2, "classes", "background and at least one more class"
        yield len(values) == len(set(values)), "classes", "every label value in one class only"
        yield bool(self.structures), "structures", "at least one structure"
        known = set(list(self.classes)[1:])
        used = [name for group in self.structures.values() for name in group]
        yield set(used) <= known and all(self.structures.values()), "structures", f"made of {sorted(known)}"
        yield self.image_size >= 32 and self.image_size % 16 == 0, "image_size", "32 or more and a multiple of 16"
        yield self.stack in (1, 3), "stack", "1 or 3"
        yield 0 < self.threshold < 1, "threshold", "a probability in (0, 1)"
        yield 0 <= self.validation_fraction < 1, "validation_fraction", "a fraction in [0, 1)"

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return len(self.classes)

    @property
    def out_channels(self) -> int:
        """Output channels of the network: K with softmax, one a structure with sigmoid."""
        return self.num_classes if self.activation == "softmax" else len(self.structures)

    def structure_classes(self) -> dict[str, list[int]]:
        """Structure name -> class indices that make it up."""
        index = {name: position for position, name in enumerate(self.classes)}
        return {name: [index[part] for part in parts] for name, parts in self.structures.items()}


@dataclass(frozen=True)
class NetworkSettings(Section):
    """The segmentation network.

    Attributes:
        name: Key of `common.networks.NETWORKS`.
        base_width: Channels of the first block (16 = RAM-DSIR); the penultimate map has twice as many.
        norm: `batch`, `group` or `instance` normalisation.
        features: Representation that class statistics and the contrastive loss describe (methods.md 1.4):
            `penultimate` (full resolution, not negative), `projection` (a training-only head of two 1 x 1 convolutions
            on it, no final ReLU) or `bottleneck` (1/16 of the resolution).
        projection: A' of `features=projection`.
    """

    name: str = "unet"
    base_width: int = 16
    norm: Literal["batch", "group", "instance"] = "batch"
    features: Literal["penultimate", "projection", "bottleneck"] = "penultimate"
    projection: int = 32

    def checks(self) -> Checks:
        """The width is a positive multiple of four, so that groups divide it."""
        yield self.base_width >= 4 and self.base_width % 4 == 0, "base_width", "4 or more and a multiple of 4"
        yield self.projection >= 1, "projection", "1 or more"

    @property
    def num_features(self) -> int:
        """A, channels of the feature map that the network returns beside the logits."""
        widths = {"penultimate": 2 * self.base_width, "bottleneck": 16 * self.base_width}
        return widths.get(self.features, self.projection)


@dataclass(frozen=True)
class RamSettings(Section):
    """RAM-DSIR: amplitude mixing, consistency of the two views and restoration (methods.md 2.5, 2.6, 2.8).

    Attributes:
        sharing: Whose amplitudes an image is mixed with. `local`: other images of the same client (with
            `federation=pooled` images of the other domains), nothing more leaves a site. `summary`: drawn from the
            log-normal summary of the other sites' window amplitudes. `bank`: window amplitudes of single images of the
            other sites. The last two need the consent of every site's own file.
        window: Half window as a share of the shorter side.
        consistency: Weight of the consistency of the two views' predictions.
        divergence: `channels` as published; `symmetric_bernoulli` adds the complementary half, for sigmoid outputs.
        restoration: Weight of the restoration loss; 0 leaves the restoration decoder out.
        encoder_rate: Learning rate of the encoder as a share of the others', while the restoration decoder is on.
        bank_size: Images a site gives to `sharing=bank`.
    """

    sharing: Literal["local", "summary", "bank"] = "local"
    window: float = 0.1
    consistency: float = 0.5
    divergence: Literal["channels", "symmetric_bernoulli"] = "channels"
    restoration: float = 0.1
    encoder_rate: float = 0.5
    bank_size: int = 32

    def checks(self) -> Checks:
        """The window fits into the spectrum, weights are not negative."""
        yield 0 < self.window <= 0.5, "window", "a share in (0, 0.5]"
        yield self.consistency >= 0, "consistency", "zero or more"
        yield self.restoration >= 0, "restoration", "zero or more"
        yield 0 < self.encoder_rate <= 1, "encoder_rate", "a share in (0, 1]"
        yield self.bank_size >= 1, "bank_size", "1 or more"


@dataclass(frozen=True)
class MethodSettings(Section):
    """How a site trains in one round.

    Attributes:
        name: Key of `clients.methods.METHODS`: `source` (supervised), `ram` (RAM-DSIR), `sgcg` or `ram_sgcg` (both).
        statistics: Whether a site computes and sends class statistics (the contrastive methods need them).
        learning_rate: Adam's rate at the start; falls as (1 - progress) ** poly_power over all rounds.
        poly_power: Exponent of that fall; 0 keeps the rate.
        weight_decay: Adam's weight decay.
        batch_size: Slices in a step.
        batch_per_domain: Slices of each source domain in a step of a client that owns several (`federation=pooled`), in
            the order of the hospitals' names; empty = `batch_size` shared out evenly.
        local_epochs: Passes over a site's training slices in a round.
        steps_per_round: Training steps in a round instead of whole epochs; 0 = use `local_epochs`.
        precision: `auto` takes bf16 on hardware that has it and float32 elsewhere.
        ram: Amplitude mixing and restoration, for `ram` and `ram_sgcg`.
    """

    name: str
    statistics: bool
    learning_rate: float = 1e-3
    poly_power: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 8
    batch_per_domain: tuple[int, ...] = ()
    local_epochs: int = 1
    steps_per_round: int = 0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    ram: RamSettings = RamSettings()

    def checks(self) -> Checks:
        """The method exists; rates and sizes are positive."""
        yield self.name in METHOD_NAMES, "name", " | ".join(METHOD_NAMES)
        yield self.learning_rate > 0, "learning_rate", "more than zero"
        yield self.poly_power >= 0, "poly_power", "zero or more"
        yield self.weight_decay >= 0, "weight_decay", "zero or more"
        yield self.batch_size >= 2, "batch_size", "2 or more (BatchNorm needs more than one slice)"
        yield self.local_epochs >= 1, "local_epochs", "1 or more"
        yield self.steps_per_round >= 0, "steps_per_round", "0 or more"
        yield all(size >= 1 for size in self.batch_per_domain), "batch_per_domain", "1 or more slices of each domain"
        needed = self.name in CONTRASTIVE
        yield self.statistics or not needed, "statistics", f"true for {self.name}, which learns from class statistics"

    @property
    def contrasts(self) -> bool:
        """Whether the method learns from the global prototypes."""
        return self.name in CONTRASTIVE

    @property
    def mixes(self) -> bool:
        """Whether the method mixes amplitudes."""
        return self.name in MIXING


@dataclass(frozen=True)
class PrototypeSettings(Section):
    """The global SgCG prototypes and the contrastive term (methods.md 1.3-1.8).

    Attributes:
        temperature: tau of the logits; 0.5 = `effective`, 100 = the SePiCo lineage (methods.md 1.5).
        weight: lambda of the contrastive term in the total loss.
        warmup_rounds: Rounds in which statistics are collected and the term is off.
        normalize: Unit-length features in statistics and loss alike.
        covariance: `full`, `diagonal`, or `none` (prototype cross-entropy).
        memory: What the server keeps between rounds, and how a site uses it (methods.md 1.8; `server.prototypes`).
        discount: gamma of `memory=discount`.
        momentum: beta of `memory=momentum`, the share of the fresh statistics.
        weighting: `pixels` = pooled over all pixels, `sites` = every site weighs the same in each class.
        balance: Mean of the loss over `pixel`s, or the mean of the per-`class` means.
        norm_mode: BatchNorm in the statistics pass: `batch` as in training, `running` as in evaluation.
        min_count: A class with fewer pixels over all sites takes no part in the loss.
        views: Views of a batch whose pixels enter the contrastive term, each averaged over its own pixels and summed:
            `source`, and `ram`, the amplitude-mixed copy (methods.md 1.6). Statistics come from the source view alone.
    """

    temperature: float = 0.5
    weight: float = 0.1
    warmup_rounds: int = 1
    normalize: bool = True
    covariance: Literal["full", "diagonal", "none"] = "full"
    memory: Literal["cumulative", "discount", "lagged", "restart", "momentum", "overlay"] = "lagged"
    discount: float = 0.9
    momentum: float = 0.5
    weighting: Literal["pixels", "sites"] = "pixels"
    balance: Literal["pixel", "class"] = "pixel"
    norm_mode: Literal["batch", "running"] = "batch"
    min_count: int = 2
    views: tuple[str, ...] = ("source",)

    def checks(self) -> Checks:
        """Temperature is positive, the discount is a proper fraction."""
        yield self.temperature > 0, "temperature", "more than zero"
        yield self.weight >= 0, "weight", "zero or more"
        yield self.warmup_rounds >= 0, "warmup_rounds", "zero or more"
        yield 0 < self.discount < 1, "discount", "a fraction in (0, 1)"
        yield 0 < self.momentum <= 1, "momentum", "a fraction in (0, 1]"
        yield set(self.views) <= {"source", "ram"} and bool(self.views), "views", "[source], [ram] or [source,ram]"
        yield len(set(self.views)) == len(self.views), "views", "each view once"
        yield self.min_count >= 1, "min_count", "1 or more"


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
        norm_policy: `average` merges BatchNorm's scale, offset and running moments like every weight and takes the
            largest of the step counters; see `server.merge`.
        selection: Model that is evaluated at the held-out site: the `last`, or the best on `source_validation`.
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
    norm_policy: Literal["average"] = "average"
    selection: Literal["last", "source_validation"] = "last"
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
        shares: What the site agrees to send besides weights and class statistics: `amplitude_summary`,
            `amplitude_bank` (methods.md 2.8).
        micro_batches: Parts into which a step is cut where the memory does not hold it; gradients are accumulated, so
            the step is the same but for BatchNorm, which sees the parts.
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

    def checks(self) -> Checks:
        """The network exists; `common.networks` refuses an unknown one too, but only when a site builds it."""
        yield self.network.name in NETWORK_NAMES, "network.name", " | ".join(NETWORK_NAMES)
        mixed = not self.method.contrasts or "ram" not in self.prototypes.views or self.method.mixes
        yield mixed, "prototypes.views", "[source]: the view ram needs method=ram_sgcg"
        pooled = self.federation.ownership == "pooled"
        yield not pooled or self.method.ram.sharing == "local", "method.ram.sharing", "local with federation=pooled"
        overlay = self.prototypes.memory == "overlay" and self.prototypes.weighting != "pixels"
        yield not overlay, "prototypes.weighting", "pixels with memory=overlay, which takes a site's own sums out again"

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

    def role(self, site: str) -> str:
        """Return `train`, `heldout` or `observer` for a site of this fold."""
        if site == self.heldout:
            return "heldout"
        return "observer" if site in self.observers else "train"

    def digest(self) -> str:
        """SHA-256 of what decides the outcome: everything but places, devices and the run's name."""
        tree = asdict(self)
        for name in ("site", "run", "output", "label", "setting"):
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
        from common.settings import build

        return build(cls, {name: tree[name] for name in tree if name in {field.name for field in fields(cls)}})
