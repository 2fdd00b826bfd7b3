"""Settings of the training: network, method of a local round, prototypes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from fedsgcg.common.settings.augmentation import BigAugSettings, GinSettings, TridSettings
from fedsgcg.common.settings.base import Checks, Section, at_most
from fedsgcg.common.settings.choices import is_import_path
from fedsgcg.common.settings.methods import (
    DsuSettings,
    ElcfsSettings,
    FedProtoSettings,
    HarmoFLSettings,
    IsdaSettings,
    JiGenSettings,
    MixStyleSettings,
    MoonSettings,
    SamlSettings,
    SgcgSettings,
)

# The keys of `common.networks.NETWORKS` and `clients.methods.METHODS`, repeated here because a plan
# is read without torch.
NETWORK_NAMES = ("unet",)
Options = dict[str, bool | int | float | str]
TRAITS: Final[dict[str, frozenset[str]]] = {
    "source": frozenset(),
    "ram": frozenset({"mixes"}),
    "sgcg": frozenset({"contrasts"}),
    "ram_sgcg": frozenset({"contrasts", "mixes"}),
    "segclr": frozenset({"pairs"}),
    "isda": frozenset({"contrasts", "raw"}),
    "moon": frozenset(),
    "mixstyle": frozenset(),
    "dsu": frozenset(),
    "harmofl": frozenset({"mixes"}),
    "fedproto": frozenset({"contrasts"}),
    "elcfs": frozenset({"mixes"}),
    "saml": frozenset({"mixes"}),
    "jigen": frozenset(),
    "bigaug": frozenset(),
    "gin": frozenset(),
    "trid": frozenset(),
    "dofe": frozenset({"raw"}),
}
"""Method -> traits: `contrasts` = learns from the global prototypes, `mixes` = mixes amplitudes,
`pairs` = learns from pairs of images without labels, `raw` = class statistics are those of the
features as the classifier reads them, regardless of `prototypes.normalize`."""

METHOD_NAMES = tuple(TRAITS)
DOMAINS: Final = 32
"""Places of DoFE's pool, the most training hospitals that it can have."""
ALL_TRAITS = ("contrasts", "mixes", "raw")


@dataclass(frozen=True)
class NetworkSettings(Section):
    """The segmentation network.

    Attributes:
        name: Key of `common.networks.NETWORKS`, or the import path of an own class,
            `package.module:Class`.
        base_width: Channels of the first block (16 = RAM-DSIR); the penultimate map has twice as
            many.
        norm: `batch`, `group` or `instance` normalisation.
        features: Feature map of the class statistics and the contrastive loss: `penultimate` (full
            resolution, not negative), `projection` (two 1 x 1 convolutions of it without a final
            ReLU, only in training) or `bottleneck` (1/16 of the resolution).
        projection: Number of channels of `features=projection`.
        projection_stride: Stride of `features=projection` in pixels, 1, 2, 4 or 8: only every
            n-th row and column is projected, and a label is that of three quarters of a cell.
        options: Keyword arguments of a network by import path, e.g. `{depth: 4}`. The settings
            above are those of the U-Net.
        feature_channels: Channels of the feature map of a network by import path, measured when
            the settings are resolved; 0 for the U-Net, whose channels follow from its width.
        domains: Places of the pool of domain knowledge, set when the settings are resolved:
            32 with `method=dofe`, 0 with every other method.
    """

    name: str = "unet"
    base_width: int = at_most(256, 16)
    norm: Literal["batch", "group", "instance"] = "batch"
    features: Literal["penultimate", "projection", "bottleneck"] = "penultimate"
    projection: int = at_most(1024, 32)
    projection_stride: int = 1
    options: Options = field(default_factory=dict)
    feature_channels: int = at_most(4096, 0)
    domains: int = at_most(64, 0)

    def checks(self) -> Checks:
        """The network exists; the width is a positive multiple of four, for group normalisation."""
        known = self.name in NETWORK_NAMES or self.is_own
        yield known, "name", " | ".join((*NETWORK_NAMES, "package.module:Class"))
        yield (
            self.is_own or not self.options,
            "options",
            "none, except for a network by import path",
        )
        measured = self.feature_channels >= 1 if self.is_own else self.feature_channels == 0
        yield measured, "feature_channels", "no value: it is measured"
        yield (
            self.base_width >= 4 and self.base_width % 4 == 0,
            "base_width",
            "4 or more and a multiple of 4",
        )
        yield self.projection >= 1, "projection", "1 or more"
        yield self.projection_stride in (1, 2, 4, 8), "projection_stride", "1 | 2 | 4 | 8"

    @property
    def is_own(self) -> bool:
        """Whether it is a class by import path."""
        return is_import_path(self.name)

    @property
    def num_features(self) -> int:
        """A, channels of the feature map that the network returns with the logits."""
        if self.is_own:
            return self.feature_channels
        widths = {"penultimate": 2 * self.base_width, "bottleneck": 16 * self.base_width}
        return widths.get(self.features, self.projection)


@dataclass(frozen=True)
class RamSettings(Section):
    """RAM-DSIR: amplitude mixing, consistency of the two views, and restoration.

    Attributes:
        sharing: Whose amplitudes an image is mixed with. The published method mixes across domains;
            `local` does so only with `federation=pooled`, where the client owns all domains. With
            `federation=by_site` the three values are different methods
            (`experiment=ram_sharing`).
            `local`: other images of the same hospital, i.e. augmentation within its domain; nothing
            more leaves a site.
            `summary`: amplitudes drawn from a log-normal distribution with the mean and channel
            covariance of the other sites' window amplitudes.
            `bank`: amplitudes of single images of the other sites, nearest to the published method.
            The last two need consent in every training site's own file (`site.shares`; else
            ROL-202).
        window: Half window as a share of the shorter side. As published, pictures are mixed in
            [0, 255] and then scaled, volumes are mixed in [-1, 1].
        consistency: Weight of the consistency of the two views' predictions.
        divergence: `channels` as published; `symmetric_bernoulli` adds the complementary half, for
            sigmoid outputs.
        restoration: Weight of the restoration loss; 0 = no restoration decoder.
        encoder_rate: Learning rate of the encoder relative to the other parts, while there is a
            restoration decoder.
        bank_size: Number of images that a site contributes to `sharing=bank`.
    """

    sharing: Literal["local", "summary", "bank"] = "local"
    window: float = 0.1
    consistency: float = 0.5
    divergence: Literal["channels", "symmetric_bernoulli"] = "channels"
    restoration: float = 0.1
    encoder_rate: float = 0.5
    bank_size: int = at_most(4096, 32)

    def checks(self) -> Checks:
        """The window fits into the spectrum; weights are not negative."""
        yield 0 < self.window <= 0.5, "window", "a share in (0, 0.5]"
        yield self.consistency >= 0, "consistency", "zero or more"
        yield self.restoration >= 0, "restoration", "zero or more"
        yield 0 < self.encoder_rate <= 1, "encoder_rate", "a share in (0, 1]"
        yield self.bank_size >= 1, "bank_size", "1 or more"


@dataclass(frozen=True)
class SegClrSettings(Section):
    """SegCLR: supervised and contrastive learning jointly, for images with and without labels.

    Attributes:
        supervised_weight: lambda of the joint loss, 1/2 L_con + lambda L_sup.
        contrast: `simclr` (NT-Xent, the other pairs of the batch are negatives) or `simsiam` (no
            negatives; stop-gradient and a predictor).
        head: What the projection head makes of the encoder's deepest map before its fully connected
            layers: `channel`, a 1 x 1 convolution to `head_channels`, which keeps the position;
            `pool`, the mean over all positions.
        pairs: The two images of a positive pair: `augment`, two augmentations of a slice; `slices`,
            two slices of a volume, at most `slice_distance` apart; `slices+augment`, both.
        tau: Temperature of NT-Xent.
        head_channels: Channels that `head=channel` keeps at every position; at most those of the
            deepest map.
        hidden: Width of the head's hidden layers.
        projection: Length of the projected vectors.
        slice_distance: Largest distance in slices of `pairs=slices`, from 1; the distance of a pair
            is uniform.
        flip: Probability of a left-right flip in a pair's augmentation.
        crop: Smallest share of a slice's area that is cut out and resized.
        jitter: Largest relative change of brightness, and of contrast.
        blur: Probability of a Gaussian blur of 0.1 to 2 pixels.
        pretraining: Share of the rounds, from the first, with the contrastive term alone; the other
            rounds then have the supervised term alone (self-supervised pre-training and
            fine-tuning). 0 trains both terms jointly.
        global_negatives: Compare a projection with the Gaussian of the other hospitals' projections
            instead of the other pairs of the batch (docs/explanation/segclr.md). Needs
            `method.statistics=true`: count, mean and covariance of every hospital's projections
            then leave it; another hospital receives only a merge of all others'. Round 1 has none
            and uses the batch.
    """

    supervised_weight: float = 20.0
    contrast: Literal["simclr", "simsiam"] = "simclr"
    head: Literal["channel", "pool"] = "channel"
    pairs: Literal["augment", "slices", "slices+augment"] = "augment"
    tau: float = 0.1
    head_channels: int = at_most(1024, 1)
    hidden: int = at_most(4096, 128)
    projection: int = at_most(4096, 128)
    slice_distance: int = at_most(64, 3)
    flip: float = 0.5
    crop: float = 0.5
    jitter: float = 0.4
    blur: float = 0.5
    pretraining: float = 0.0
    global_negatives: bool = False

    def checks(self) -> Checks:
        """Weights and widths are positive; probabilities and shares are in their ranges."""
        compares = not self.global_negatives or self.contrast == "simclr"
        yield compares, "global_negatives", "false with contrast=simsiam, which has no negatives"
        yield 0 <= self.supervised_weight <= 1e4, "supervised_weight", "zero to 10 000"
        yield 1e-3 <= self.tau <= 100, "tau", "0.001 to 100"
        yield self.head_channels >= 1, "head_channels", "1 or more"
        yield self.hidden >= 2, "hidden", "2 or more"
        yield self.projection >= 4, "projection", "4 or more"
        yield self.slice_distance >= 1, "slice_distance", "1 or more"
        yield 0 <= self.flip <= 1, "flip", "a probability"
        yield 0 < self.crop <= 1, "crop", "a share in (0, 1]"
        yield 0 <= self.jitter < 1, "jitter", "a share in [0, 1)"
        yield 0 <= self.blur <= 1, "blur", "a probability"
        yield 0 <= self.pretraining < 1, "pretraining", "a share in [0, 1)"


@dataclass(frozen=True)
class MethodSettings(Section):
    """How a site trains in one round.

    Attributes:
        name: Key of `clients.methods.METHODS`, e.g. `source` (supervised), `ram` (RAM-DSIR), `sgcg`
            or `ram_sgcg` (both), see "Methods" in the documentation; or the import path of an own
            class, `package.module:Class`.
        statistics: Whether a site computes and sends class statistics, which contrastive methods
            need.
        learning_rate: Adam's initial rate; it decays as (1 - progress) ** poly_power over all
            rounds.
        poly_power: Exponent of the decay; 0 keeps the rate constant.
        weight_decay: Adam's weight decay.
        batch_size: Slices per step.
        batch_per_domain: Slices of each source domain per step, in the order of the hospitals'
            names, for a client with several domains (`federation=pooled`); empty = `batch_size`
            divided evenly.
        local_epochs: Passes over a site's training slices per round.
        steps_per_round: Training steps per round, instead of epochs; 0 = use `local_epochs`.
        precision: `auto` uses bf16 on hardware that supports it and float32 elsewhere.
        unlabelled: How the method treats the hospitals of the setting `unlabelled`: `refuse` (it
            cannot use them); `contrast`, they train with the contrastive term alone and their masks
            are never read (`segclr`); `leave_out`, they do not train; `labels`, they train with
            their masks, an upper bound for comparison and marked as such. In every case a hospital
            is evaluated on the cases that its manifest assigns to `test`.
        ram: Amplitude mixing and restoration, for `ram` and `ram_sgcg`. The window and the sharing
            are also those of `harmofl`, `elcfs` and `saml`, which mix amplitudes.
        sgcg: Variants of the contrastive term, for `sgcg` and `ram_sgcg`.
        isda: Semantic augmentation of the features, for `isda`.
        moon: Contrast between models, for `moon`.
        mixstyle: Mixing of feature statistics, for `mixstyle`.
        dsu: Perturbation of feature statistics, for `dsu`.
        harmofl: Flat minimum, for `harmofl`.
        fedproto: Distance to the global class means, for `fedproto`.
        elcfs: Episodes and boundary contrast, for `elcfs`.
        saml: Episodes and shape losses, for `saml`.
        jigen: Jigsaw puzzles, for `jigen`.
        bigaug: Stacked transforms of the slices, for `bigaug`.
        gin: Views through random networks, for `gin`.
        trid: Random feature statistics, for `trid`.
        segclr: The contrastive term of `segclr`.
        options: Options of an own method, e.g. `{margin: 0.5}`.
        traits: Traits of an own method: `contrasts` = learns from the global prototypes, `mixes` =
            mixes amplitudes, `raw` = class statistics of features that are not normalised. Taken
            from its class when the settings are resolved, and compared with the class at the sites.
    """

    name: str
    statistics: bool
    learning_rate: float = 1e-3
    poly_power: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = at_most(1024, 8)
    batch_per_domain: tuple[int, ...] = at_most(100, ())
    local_epochs: int = at_most(1000, 1)
    steps_per_round: int = at_most(1_000_000, 0)
    precision: Literal["auto", "float32", "bf16"] = "auto"
    unlabelled: Literal["refuse", "contrast", "leave_out", "labels"] = "refuse"
    ram: RamSettings = RamSettings()
    segclr: SegClrSettings = SegClrSettings()
    sgcg: SgcgSettings = field(default_factory=SgcgSettings)
    isda: IsdaSettings = field(default_factory=IsdaSettings)
    moon: MoonSettings = field(default_factory=MoonSettings)
    mixstyle: MixStyleSettings = field(default_factory=MixStyleSettings)
    dsu: DsuSettings = field(default_factory=DsuSettings)
    harmofl: HarmoFLSettings = field(default_factory=HarmoFLSettings)
    fedproto: FedProtoSettings = field(default_factory=FedProtoSettings)
    elcfs: ElcfsSettings = field(default_factory=ElcfsSettings)
    saml: SamlSettings = field(default_factory=SamlSettings)
    jigen: JiGenSettings = field(default_factory=JiGenSettings)
    bigaug: BigAugSettings = field(default_factory=BigAugSettings)
    gin: GinSettings = field(default_factory=GinSettings)
    trid: TridSettings = field(default_factory=TridSettings)
    options: Options = field(default_factory=dict)
    traits: tuple[str, ...] = ()

    def checks(self) -> Checks:
        """The method exists; rates and sizes are positive."""
        known = self.name in METHOD_NAMES or self.is_own
        yield known, "name", " | ".join((*METHOD_NAMES, "package.module:Class"))
        yield self.is_own or not self.options, "options", "none, except for a method by import path"
        yield set(self.traits) <= set(ALL_TRAITS), "traits", " | ".join(ALL_TRAITS)
        yield self.is_own or not self.traits, "traits", "none, except for a method by import path"
        yield self.learning_rate > 0, "learning_rate", "more than zero"
        yield self.poly_power >= 0, "poly_power", "zero or more"
        yield self.weight_decay >= 0, "weight_decay", "zero or more"
        yield self.batch_size >= 2, "batch_size", "2 or more (BatchNorm needs more than one slice)"
        yield self.local_epochs >= 1, "local_epochs", "1 or more"
        yield self.steps_per_round >= 0, "steps_per_round", "0 or more"
        yield (
            all(1 <= size <= 1024 for size in self.batch_per_domain),
            "batch_per_domain",
            "1 to 1024 slices of each domain",
        )
        yield (
            self.unlabelled != "contrast" or self.pairs,
            "unlabelled",
            f"refuse | leave_out | labels: {self.name} has no term for images without labels",
        )
        needed = self.contrasts
        yield (
            self.statistics or not needed,
            "statistics",
            f"true for {self.name}, which learns from class statistics",
        )
        described = self.statistics or not self.describes_projections
        expected = "true with method.segclr.global_negatives, which compares with statistics"
        yield described, "statistics", expected

    @property
    def is_own(self) -> bool:
        """Whether it is a class by import path."""
        return is_import_path(self.name)

    @property
    def contrasts(self) -> bool:
        """Whether the method learns from the global prototypes."""
        return "contrasts" in TRAITS.get(self.name, self.traits)

    @property
    def mixes(self) -> bool:
        """Whether the method mixes amplitudes."""
        return "mixes" in TRAITS.get(self.name, self.traits)

    @property
    def pairs(self) -> bool:
        """Whether the method learns from pairs of images without labels."""
        return "pairs" in TRAITS.get(self.name, self.traits)

    @property
    def describes_projections(self) -> bool:
        """Whether a site's statistics are those of its slices' projections, not of its classes."""
        return self.name == "segclr" and self.segclr.global_negatives

    @property
    def raw(self) -> bool:
        """Whether class statistics are those of features that are not normalised."""
        return "raw" in TRAITS.get(self.name, self.traits)

    @property
    def restores(self) -> bool:
        """Whether the method has RAM-DSIR's restoration decoder."""
        has_decoder = self.name in ("ram", "ram_sgcg") or (self.is_own and self.mixes)
        return has_decoder and self.ram.restoration > 0


@dataclass(frozen=True)
class PrototypeSettings(Section):
    """The global SgCG prototypes and the contrastive term.

    Attributes:
        temperature: tau of the logits; 100 in the code SgCG descends from
            (`prototypes=paper_lineage`).
        weight: lambda of the contrastive term in the total loss.
        warmup_rounds: Rounds in which statistics are collected and the term is off.
        normalize: Scale features to unit length, in statistics and loss.
        covariance: `full`, `diagonal`, or `none` (prototype cross-entropy).
        memory: What the server keeps between rounds, and how a site uses it
            (`server.aggregation.prototypes`). `restart` describes the model with which the round
            starts, in the exchange that measures BatchNorm's moments; `online` is the paper's
            update with every training batch. The untrained network is never included.
        discount: gamma of `memory=discount`.
        momentum: beta of `memory=momentum`, the weight of the new statistics.
        weighting: `pixels` = pooled over all pixels, `sites` = all sites have the same weight in
            each class, `median` = the median of each entry of the sites' class means, with the
            covariance of the site whose trace is in the middle; a minority of broken sites cannot
            move it out of the range of the others.
        trimmed: Sites left out of each class of the prototypes, those farthest from the others;
            three sites are needed for one, five for two. 0 pools all sites exactly.
        balance: Mean of the loss over `pixel`s, or the mean of the per-`class` means.
        norm_mode: BatchNorm in the statistics pass: `batch` as in training, `running` as in
            evaluation. With `batch` every client is normalised by its own batches, so that the
            traces of a round understate the shift between sites; those of the chosen model
            (`between_site_trace_evaluation`) use one normalisation for all.
        min_count: A class with fewer pixels over all sites is left out of the loss.
        shared: What a site sends of its pixels: `full`, count, mean and scatter of every class; or
            `means`, count and mean of `blocks` random blocks of each class's pixels, from which the
            coordinator estimates the covariance (`common.block_means`). Fewer numbers, none of them
            a product of single pixels' channels.
        blocks: Blocks of each class at a site with `shared=means`, 2 or more.
        views: Views of a batch whose pixels enter the contrastive term, each averaged over its own
            pixels, then summed: `source`; `ram`, the amplitude-mixed copy; and `style`, a copy
            through a random network (`method.gin.strength`) that enters no other term. Statistics
            use only the source view, so that `[ram]` and `[style]` compare changed images with
            prototypes of unchanged ones.
    """

    temperature: float = 0.5
    weight: float = 1.0
    warmup_rounds: int = 1
    normalize: bool = True
    covariance: Literal["full", "diagonal", "none"] = "full"
    memory: Literal[
        "cumulative", "discount", "lagged", "restart", "momentum", "overlay", "online"
    ] = "restart"
    discount: float = 0.9
    momentum: float = 0.5
    weighting: Literal["pixels", "sites", "median"] = "pixels"
    trimmed: int = 0
    balance: Literal["pixel", "class"] = "pixel"
    norm_mode: Literal["batch", "running"] = "batch"
    min_count: int = 2
    shared: Literal["full", "means"] = "full"
    blocks: int = at_most(1024, 4)
    views: tuple[str, ...] = ("source",)

    def checks(self) -> Checks:
        """The temperature is positive; discount and momentum are fractions; views are known."""
        yield self.temperature > 0, "temperature", "more than zero"
        yield self.weight >= 0, "weight", "zero or more"
        yield self.warmup_rounds >= 0, "warmup_rounds", "zero or more"
        yield 0 < self.discount < 1, "discount", "a fraction in (0, 1)"
        yield 0 < self.momentum <= 1, "momentum", "a fraction in (0, 1]"
        yield (
            set(self.views) <= {"source", "ram", "style"} and bool(self.views),
            "views",
            "one or more of source, ram, style",
        )
        yield len(set(self.views)) == len(self.views), "views", "each view once"
        yield self.trimmed >= 0, "trimmed", "0 (none) or more"
        yield self.min_count >= 1, "min_count", "1 or more"
        yield self.blocks >= 2, "blocks", "2 or more: one mean has no spread"
        own = self.shared == "means" and self.memory in ("overlay", "online")
        yield not own, "shared", f"full with memory={self.memory}, which adds a site's own pixels"
