"""`fedsgcg-site join KIT` with the resident of `tests.nemesis.resident`, which records and poisons.

With `{"skew_s": 600}` in `KIT/nemesis.json` the SuperNode's clock is wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsgcg.deploy.cli import site
from fedsgcg.deploy.site import check_link, supervisor

ROOT = Path(__file__).resolve().parents[2]


def replaced(original: Callable[..., list[str]], first: str, module: str) -> Callable[..., Any]:
    """Return a function that gives the arguments of a command line to another program.

    Args:
        original: Returns the command line.
        first: The first argument that the other program gets.
        module: The other program, whose `main` is called.
    """
    # The site's environment does not say where the tests are.
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module} as program; "
    start += "sys.exit(program.main())"

    def command(*arguments: Any, **keywords: Any) -> list[str]:
        line = original(*arguments, **keywords)
        return [sys.executable, "-P", "-c", start, *line[line.index(first) :]]

    return command


class Skewed:
    """The module `time` of a machine whose clock is wrong."""

    def __init__(self, skew_s: float) -> None:
        self._skew_s = skew_s

    def time(self) -> float:
        return time.time() + self._skew_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def main() -> int:
    """Join, with what the kit's `nemesis.json` asks for."""
    kit = Path(sys.argv[2])
    facts = json.loads((kit / "nemesis.json").read_text())
    site_file = str((kit / "site.yaml").resolve())
    supervisor.resident_command = replaced(
        supervisor.resident_command, site_file, "tests.nemesis.resident"
    )
    if facts.get("skew_s"):
        check_link.time = Skewed(float(facts["skew_s"]))
        os.environ["FEDSGCG_NEMESIS_SKEW_S"] = str(facts["skew_s"])
        supervisor.supernode_command = replaced(
            supervisor.supernode_command, "--root-certificates", "tests.nemesis.node"
        )
    return int(site.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
