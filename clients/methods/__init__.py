"""The training methods: a method's views of a batch, its additional networks and its loss.

A method runs the network on a batch and computes the loss in float32 outside autocast, because
logits in bf16 would lose the quadratic term. To add a method, write a module here, register it in
`METHODS` and in `common.settings.training.TRAITS`, and add a file to `configs/method`. A class
elsewhere can be used by its import path, `method=package.module:Class`.
"""

from __future__ import annotations

from fedsgcg.clients.methods.base import Loss, Source, View
from fedsgcg.clients.methods.bigaug import BigAug
from fedsgcg.clients.methods.dofe import Dofe
from fedsgcg.clients.methods.elcfs import Elcfs
from fedsgcg.clients.methods.feature_style import Dsu, MixStyle
from fedsgcg.clients.methods.fedproto import FedProto
from fedsgcg.clients.methods.gin import Gin
from fedsgcg.clients.methods.guidance import Guidance, Guide
from fedsgcg.clients.methods.harmofl import HarmoFL
from fedsgcg.clients.methods.isda import Isda
from fedsgcg.clients.methods.jigen import JiGen
from fedsgcg.clients.methods.moon import Moon
from fedsgcg.clients.methods.ram import Ram, RamSgCG
from fedsgcg.clients.methods.saml import Saml
from fedsgcg.clients.methods.segclr import SegCLR
from fedsgcg.clients.methods.sgcg import SgCG
from fedsgcg.clients.methods.trid import Trid
from fedsgcg.common.settings.own_code import load_class, traits_of, unusable
from fedsgcg.common.settings.plan import MethodSettings

METHODS: dict[str, type[Source]] = {
    "source": Source,
    "ram": Ram,
    "sgcg": SgCG,
    "ram_sgcg": RamSgCG,
    "segclr": SegCLR,
    "isda": Isda,
    "moon": Moon,
    "mixstyle": MixStyle,
    "dsu": Dsu,
    "harmofl": HarmoFL,
    "fedproto": FedProto,
    "elcfs": Elcfs,
    "saml": Saml,
    "jigen": JiGen,
    "bigaug": BigAug,
    "gin": Gin,
    "trid": Trid,
    "dofe": Dofe,
}


def method_class(settings: MethodSettings) -> type[Source]:
    """Return the class of a built-in method or of an import path.

    Raises:
        FedsgcgError: CFG-011 for a class that is not a method, or whose traits differ from the
            plan's.
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
            settings.name, f"a class with: {found}", "method", f"those of the plan: {expected}"
        )
    return cls


__all__ = ["METHODS", "Guidance", "Guide", "Loss", "Source", "View", "method_class"]
