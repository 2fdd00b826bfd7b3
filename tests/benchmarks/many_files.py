"""`python -m tests.benchmarks.many_files`: prepare and check a folder of many files.

Makes small pictures of two hospitals and runs both commands as a user does, each in a process of
its own. Prints for each the seconds, the most memory and the longest time without a line of output
(of a console that is no terminal). Two sizes show whether time and memory a file are flat.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PROGRAM = "import sys; from fedsgcg.deploy.cli.coordinator import main; sys.exit(main())"
QUICK = ("data.image_size=32", "network.base_width=4", "device=cpu", "method.batch_size=2")
MASKS = 16
"""Different masks; the files of a case are links to them. All images differ."""


def make_pictures(folder: Path, files: int, side: int = 32) -> Path:
    """Write `files` files, half of them images, as `<hospital>/<number>_image.png` and `_mask.png`.

    Args:
        folder: A new folder.
        files: Number of files.
        side: Pixels of a side.
    """
    rng = np.random.default_rng(0)
    masks = []
    (folder / ".masks").mkdir(parents=True)
    for number in range(MASKS):
        mask = np.zeros((side, side), np.uint8)
        mask[number : number + side // 3, 4 : 4 + side // 3] = 1
        masks.append(folder / ".masks" / f"{number}.png")
        Image.fromarray(mask).save(masks[-1])
    for site in ("A", "B"):
        (folder / site).mkdir()
    for number in range(files // 2):
        home = folder / "AB"[number % 2]
        pixels = rng.integers(0, 256, (side, side), np.uint8)
        Image.fromarray(pixels).save(home / f"{number:06d}_image.png", compress_level=0)
        os.link(masks[number % MASKS], home / f"{number:06d}_mask.png")
    return folder


def measure(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, peak MB and the longest seconds without a line."""
    start = last = time.monotonic()
    silent = 0.0
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic()
            silent, last = max(silent, now - last), now
            if line.startswith(("complete", "fedsgcg data check:")):
                print(f"    {line.strip()}")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    if process.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss / 1024, max(silent, time.monotonic() - last)


def main() -> None:
    """Measure the requested sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, nargs="+", default=[500, 2000], metavar="N")
    parser.add_argument("--link", action="store_true", help="links instead of copies")
    options = parser.parse_args()
    rows = []
    for files in options.files:
        with tempfile.TemporaryDirectory() as scratch:
            source = make_pictures(Path(scratch) / "source", files)
            out = str(Path(scratch) / "out")
            prepare = ["data", "prepare", str(source), "-o", out]
            for name, arguments in (
                ("prepare", [*prepare, "--link"] if options.link else prepare),
                ("prepare again", [*prepare, "--link"] if options.link else prepare),
                ("check", ["data", "check", out, *QUICK]),
            ):
                print(f"{name}, {files} files", flush=True)
                rows.append((name, files, *measure(arguments)))
    print("| command | files | seconds | ms a case | peak MB | longest silence (s) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, files, seconds, memory, silent in rows:
        each = 2000 * seconds / files
        print(f"| {name} | {files} | {seconds:.0f} | {each:.2f} | {memory:.0f} | {silent:.1f} |")


if __name__ == "__main__":
    main()
