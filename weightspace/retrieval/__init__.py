"""Finding models that are alike: the training-free descriptor, its distance, and that blended with the encoder's."""

from __future__ import annotations

from weightspace.retrieval.blend import SHARE, blended
from weightspace.retrieval.descriptor import DIMENSION, FEATURES, Description, describe, distances

__all__ = ["DIMENSION", "FEATURES", "SHARE", "Description", "blended", "describe", "distances"]
