"""Metanets that come trained: an encoder that networks are searched with, and a predictor of accuracy.

``weightspace.embed`` and ``weightspace.predict_accuracy`` ask them; ``python -m weightspace.pretrained`` makes them.
"""

from __future__ import annotations

from weightspace.pretrained.applicability import Applicability, Limits, Range
from weightspace.pretrained.conformal import Prediction
from weightspace.pretrained.model import Reading, Shipped, shipped
from weightspace.pretrained.reading import Embedding, embed, predict_accuracy

__all__ = [
    "Applicability", "Embedding", "Limits", "Prediction", "Range", "Reading", "Shipped", "embed", "predict_accuracy",
    "shipped",
]  # fmt: skip
