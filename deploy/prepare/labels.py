"""The label values of own data, and the settings that are proposed for them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedsgcg.clients.data.slices import whole_label
from fedsgcg.common.errors import fail
from fedsgcg.common.images.layers import Layers
from fedsgcg.deploy.prepare.structures import Overlaps

MAX_LABELS: Final = 64
"""A mask with more distinct values than this is not a label map."""

VOLUME_RULES: Final = (
    "intensity: percentile   # each volume's 1st to 99th percentile; or minmax, zscore",
    "stack: 3   # channels: a slice and both neighbours; 1 = the slice alone",
)
PICTURE_RULES: Final = (
    "intensity: percentile   # each picture's 1st to 99th percentile; fixed: 0 to 255, 8 bits only",
    "stack: 1   # a picture's channels are its colours, or its grey values three times",
)
RULES: Final = (
    "aspect: pad   # a slice keeps its shape; squeeze = it fills the square training slice",
    "plan: fixed   # auto = image size, spacing, intensity and stack follow from the images",
    "largest_component: false   # true only if every structure is in one piece",
    "fill_holes: false   # true only if no structure has a hole",
)
"""Written with their defaults: they follow from anatomy, never from the masks of all hospitals,
which would include those of the held-out one."""


class Labels:
    """Label values in the masks of a data set.

    Attributes:
        seen: Value -> number of masks that contain it.
        allowed: Values that a mask may contain; None = 0 to 255.
        names: Value -> name of its class, as far as the data set says it.
        regions: Structure -> the values it consists of; empty for one structure a class.
    """

    def __init__(self, allowed: frozenset[int] | None) -> None:
        self.seen: Counter[int] = Counter()
        self.allowed = allowed
        self.names: dict[int, str] = {}
        self.regions: dict[str, tuple[int, ...]] = {}
        self.overlaps = Overlaps()
        self._record: dict[str, Any] = {}

    def take(self) -> dict[str, Any]:
        """Return what the last mask had, as JSON, and forget it."""
        record, self._record = self._record, {}
        return record

    def restore(self, record: Mapping[str, Any]) -> None:
        """Count a mask of an earlier call by what `take` returned for it."""
        self.seen.update({int(value) for value in record.get("values", ())})
        if "sets" in record:
            self.overlaps.restore(record)

    def add(self, layers: Layers) -> None:
        """Record masks with one layer a structure."""
        self._record = self.overlaps.add(layers)

    def settle(self) -> None:
        """After the conversion, take the values from masks with one layer a structure."""
        if self.overlaps.names:
            self.seen += self.overlaps.counts()
            self.names = self.names | self.overlaps.classes()
            self.regions = self.regions or self.overlaps.structures()

    def check(self, values: Sequence[float], where: str) -> None:
        """Record the values of one mask; raises DAT-109 for a value that is not allowed."""
        labels = {value: whole_label(value) for value in values}
        allowed = range(256) if self.allowed is None else self.allowed
        odd = [value for value, label in labels.items() if label not in allowed]
        if odd or len(values) > MAX_LABELS:
            found = "values " + ", ".join(f"{value:.9g}" for value in (odd or values)[:8])
            expected = "integers from 0 to 255, one per class"
            if self.allowed is not None:
                expected = "values " + ", ".join(map(str, sorted(self.allowed)))
            raise fail(
                "DAT-109", found=found, expected=expected, action="Correct the mask.", where=where
            )
        whole = sorted({label for label in labels.values() if label is not None})
        self._record = {"values": whole}
        self.seen.update(whole)

    def classes(self) -> dict[str, list[int]]:
        """Return a class for each value, the background first."""
        names = {value: f"class_{value}" for value in sorted({*self.seen, *self.names})}
        return {name: [v] for v, name in sorted((names | self.names | {0: "background"}).items())}

    def structures(self) -> dict[str, list[str]]:
        """Return the classes of each structure."""
        names = {value: name for name, (value,) in self.classes().items()}
        if not self.regions:
            return {name: [name] for value, name in names.items() if value}
        return {
            region: [names[value] for value in values if value in names]
            for region, values in self.regions.items()
        }

    def counts(self) -> str:
        """Return the number of masks with each value, "" if no mask was read."""
        return ", ".join(f"{value} in {self.seen[value]}" for value in sorted(self.seen))

    def absent(self) -> list[str]:
        """Return the named values that no mask has."""
        return [f"{name} ({v})" for v, name in sorted(self.names.items()) if v and not self.seen[v]]

    def are_named(self) -> bool:
        """Whether the data set itself names the class of every label value."""
        return {value for value in self.seen if value} <= self.names.keys()


def settings_text(folder: Path, labels: Labels, *, pictures: bool) -> str:
    """Return settings for prepared own data, to be edited: names of classes and structures.

    Args:
        folder: The prepared folder.
        labels: The label values of all masks.
        pictures: Whether the images are pictures, whose distances are in pixels.

    Returns:
        Text of a YAML file; "" if the masks do not have the background and another value.
    """
    classes = labels.classes()
    if 0 not in labels.seen or len(classes) < 2:
        return ""
    lines = [
        "# Settings of these data, for `fedsgcg study data=THIS_FILE`. Rename the classes if you",
        "# like. A structure is what is reported; it may consist of several classes.",
        f"name: {json.dumps(folder.resolve().name, ensure_ascii=False)}",
        f"root: {json.dumps(str(folder.resolve()), ensure_ascii=False)}",
        "classes:",
        *(f"  {name}: {values}" for name, values in classes.items()),
        "structures:",
        *(f"  {name}: [{', '.join(parts)}]" for name, parts in labels.structures().items()),
        f"spacing_unit: {'pixel' if pictures else 'mm'}",
        *(PICTURE_RULES if pictures else VOLUME_RULES),
        *RULES,
    ]
    return "\n".join(lines) + "\n"
