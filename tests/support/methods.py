"""Plans of many methods from one composition, which takes a third of a second."""

from typing import Any

import yaml

from fedsgcg.common.settings.choices import CONFIGS
from fedsgcg.common.settings.resolve import resolve_domains

Tree = dict[str, Any]


def with_method(tree: Tree, name: str, *texts: str) -> Tree:
    """Return resolved settings with another choice of `method` and with settings `name=value`.

    Args:
        tree: Resolved settings with `method=source`.
        name: The choice.
        texts: Settings, with values in YAML.
    """
    found = {**tree, "network": dict(tree["network"]), "method": _method(tree["method"], name)}
    for text in texts:
        key, _, value = text.partition("=")
        *sections, leaf = key.split(".")
        part = found
        for section in sections:
            part[section] = dict(part[section])
            part = part[section]
        part[leaf] = yaml.safe_load(value)
    resolve_domains(found)
    return found


def _method(base: Tree, name: str) -> Tree:
    own = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())
    for parent in own.pop("defaults", ()):
        base = _method(base, parent)
    return base | {
        key: base[key] | value if isinstance(value, dict) else value for key, value in own.items()
    }
