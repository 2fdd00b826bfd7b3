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
    found = _chosen(tree, name)
    found |= {"network": dict(found["network"])}
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


def _chosen(tree: Tree, name: str) -> Tree:
    """Merge the file of a choice, and those that it starts from, into all settings."""
    text = (CONFIGS / "method" / f"{name}.yaml").read_text()
    own = yaml.safe_load(text)
    for parent in own.pop("defaults", ()):
        if not str(parent).startswith("/"):  # another group's choice
            tree = _chosen(tree, str(parent).partition("@")[0])
    return _merged(tree, own if "@package _global_" in text else {"method": own})


def _merged(base: Tree, own: Tree) -> Tree:
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) else value
        for key, value in own.items()
    }
