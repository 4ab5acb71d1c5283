"""Finding models that are alike: by the training-free descriptor, by function, and these blended with the encoder."""

from __future__ import annotations

from weightspace.retrieval.blend import OF_FUNCTION, SHARE, blended, with_function
from weightspace.retrieval.descriptor import DIMENSION, FEATURES, Description, describe, distances

__all__ = [
    "DIMENSION", "FEATURES", "OF_FUNCTION", "SHARE", "Description", "blended", "describe", "distances", "with_function",
]  # fmt: skip
