"""A zoo: a folder of models with an index that answers which of them are alike."""

from __future__ import annotations

from weightspace.zoo.zoo import IndexReport, Neighbour, Zoo

__all__ = ["IndexReport", "Neighbour", "Zoo"]
