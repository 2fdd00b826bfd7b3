"""`fedsgcg-site join KIT` with the resident of `tests.nemesis.resident`, which records and poisons.

With `{"skew_s": 600}` in `KIT/nemesis.json` the SuperNode's clock is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsgcg.deploy.cli import site
from fedsgcg.deploy.site import supervisor

HERE = Path(__file__).resolve().parent


def replaced(
    original: Callable[..., list[str]], part: str, script: str
) -> Callable[..., list[str]]:
    """Return a function that gives the same command line for another program."""

    def command(*arguments: Any, **keywords: Any) -> list[str]:
        line = original(*arguments, **keywords)
        place = next(index for index, text in enumerate(line) if part in text)
        return [sys.executable, str(HERE / script), *line[place + 1 :]]

    return command


def main() -> int:
    """Join, with what the kit's `nemesis.json` asks for."""
    kit = Path(sys.argv[2])
    facts = json.loads((kit / "nemesis.json").read_text())
    supervisor.resident_command = replaced(
        supervisor.resident_command, "site.resident", "resident.py"
    )
    if facts.get("skew_s"):
        os.environ["FEDSGCG_NEMESIS_SKEW_S"] = str(facts["skew_s"])
        supervisor.supernode_command = replaced(
            supervisor.supernode_command, "flower-supernode", "node.py"
        )
    return int(site.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
