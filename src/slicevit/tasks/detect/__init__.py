"""Object detection: torchvision's FCOS over a backbone of any sliceable family, all widths in one detector."""
