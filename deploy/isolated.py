"""Start a module of this package without any setting of the environment or cached bytecode.

    python -I -B -X pycache_prefix=/dev/null deploy/isolated.py MODULE ARGUMENT...

`-I` ignores `PYTHONPATH` and every other `PYTHON*` variable, the user's own packages and the
working directory; with the prefix, `.pyc` files in `__pycache__` are neither read nor written, so
that only source code which was approved can run. Run as a script, this file imports nothing of the
package itself: it first puts the folder of the package that it belongs to on the path.
"""

import importlib
import sys
from pathlib import Path

BYTECODE_FREE = ("-I", "-B", "-X", "pycache_prefix=/dev/null")
"""Options of Python for every process of a site. Nothing can exist below `/dev/null`."""


def isolated(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs `main()` of `module` (`module:function` for another)."""
    return [sys.executable, *BYTECODE_FREE, str(Path(__file__).resolve()), module, *arguments]


def main() -> None:
    """Import the module named first and exit with the result of its function."""
    program = Path(__file__).resolve().parents[1]
    # A checkout has the package next to its parts, an install has them inside of it.
    checkout = (program / "fedsgcg" / "__init__.py").is_file()
    sys.path.insert(0, str(program if checkout else program.parent))
    del sys.argv[0]
    module, _, function = sys.argv[0].partition(":")
    sys.exit(getattr(importlib.import_module(module), function or "main")())


if __name__ == "__main__":
    main()
