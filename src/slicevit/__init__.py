"""slicevit: one Vision Transformer checkpoint that is every narrower one too."""

from slicevit.version import __version__

__all__ = ["__version__"]
