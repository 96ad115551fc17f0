"""Models that answer for every pixel: decoders over the feature maps of a timm model, sliced with it; saved ones."""
