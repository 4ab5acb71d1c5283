"""Finding models that are alike: the training-free descriptor and its distance."""

from __future__ import annotations

from weightspace.retrieval.descriptor import DIMENSION, FEATURES, Description, describe, distances

__all__ = ["DIMENSION", "FEATURES", "Description", "describe", "distances"]
