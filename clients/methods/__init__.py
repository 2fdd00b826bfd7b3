"""The training methods: what each makes of a batch, which networks it needs beside the U-Net, and its loss.

A method runs the network on a batch and returns the loss in float32 outside autocast (methods.md 1.7). To add one,
write a file here, name it in `METHODS` and in `common.settings.training.TRAITS`, and give it a file in
`configs/method`; or leave the class where it is and give its import path, `method=package.module:Class`.
"""

from __future__ import annotations

from clients.methods.base import Loss, Source, View
from clients.methods.guidance import Guidance, Guide
from clients.methods.ram import Ram, RamSgCG
from clients.methods.sgcg import SgCG
from common.settings.own_code import load_class, traits_of, unusable
from common.settings.plan import MethodSettings

METHODS: dict[str, type[Source]] = {"source": Source, "ram": Ram, "sgcg": SgCG, "ram_sgcg": RamSgCG}


def method_class(settings: MethodSettings) -> type[Source]:
    """Return the class of a method, shipped or by import path.

    Raises:
        FedsgcgError: CFG-011 for a class that is no method, or does other things than the plan says.
    """
    if not settings.is_own:
        return METHODS[settings.name]
    cls = load_class(settings.name, "method")
    if not issubclass(cls, Source):
        raise unusable(
            settings.name, f"{cls.__name__}", "method", "a subclass of clients.methods.Source"
        )
    if traits_of(cls) != settings.traits:
        found, expected = (
            ", ".join(traits) or "nothing" for traits in (traits_of(cls), settings.traits)
        )
        raise unusable(
            settings.name, f"a class that says: {found}", "method", f"as in the plan: {expected}"
        )
    return cls


__all__ = ["METHODS", "Guidance", "Guide", "Loss", "Source", "View", "method_class"]
