"""Architectures that timm does not have, in its style; importing this package registers them with timm."""

from slicevit.models.uniformer import HourglassUniFormer, UniFormer

__all__ = ["HourglassUniFormer", "UniFormer"]
