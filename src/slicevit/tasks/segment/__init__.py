"""Semantic segmentation: a backbone of any sliceable family under a decoder that may be sliced with it."""
