"""slicevit: one Vision Transformer checkpoint that is every narrower one too."""

from slicevit.elastic import ElasticModel, SliceSettings, create_model
from slicevit.families import Family, Fused, register_family
from slicevit.version import __version__
from slicevit.widths import WidthGrid

__all__ = [
    "ElasticModel",
    "Family",
    "Fused",
    "SliceSettings",
    "WidthGrid",
    "__version__",
    "create_model",
    "register_family",
]
