"""slicevit: one Vision Transformer checkpoint that is every narrower one too."""

from slicevit.version import __version__, check_installed

check_installed()

from slicevit import models  # registers them with timm
from slicevit.calibration import calibrate
from slicevit.checkpoint import from_pretrained
from slicevit.elastic import ElasticModel, SliceSettings, create_model
from slicevit.families import Family, Fused, register_family
from slicevit.merging import MergedTokens
from slicevit.published import load_scala_checkpoint
from slicevit.rewiring import measure_importance, rewire
from slicevit.widths import WidthGrid

__all__ = [
    "ElasticModel",
    "Family",
    "Fused",
    "MergedTokens",
    "SliceSettings",
    "WidthGrid",
    "__version__",
    "calibrate",
    "create_model",
    "from_pretrained",
    "load_scala_checkpoint",
    "measure_importance",
    "models",
    "register_family",
    "rewire",
]
