"""The training methods: what each makes of a batch, which networks it needs beside the U-Net, and its loss.

A method runs the network on a batch and returns the loss in float32 outside autocast (methods.md 1.7). To add one,
write a file here, name it in `METHODS` and in `common.plan.METHOD_NAMES`, and give it a file in `configs/method`.
"""

from __future__ import annotations

from clients.methods.guidance import Guidance, Guide
from clients.methods.ram import Ram, RamSgCG
from clients.methods.sgcg import SgCG
from clients.methods.supervised import Loss, Source, View

METHODS: dict[str, type[Source]] = {"source": Source, "ram": Ram, "sgcg": SgCG, "ram_sgcg": RamSgCG}

__all__ = ["METHODS", "Guidance", "Guide", "Loss", "Source", "View"]
