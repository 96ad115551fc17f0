"""Segmenters and detectors: decoders over the feature maps of a timm model, sliced with it, and saved ones."""
