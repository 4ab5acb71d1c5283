"""Merging: several models into one, from files to a file, tensor by tensor."""

from __future__ import annotations

from weightspace.callable import make_callable
from weightspace.merge.data import MergeData
from weightspace.merge.entry import merge
from weightspace.merge.method import Elementwise, Method, Models, PerTensor, Prepared, Reshaped, TwoPass, WithData
from weightspace.merge.methods import METHODS
from weightspace.merge.report import Merged, Report

__all__ = [
    "METHODS",
    "Elementwise",
    "MergeData",
    "Merged",
    "Method",
    "Models",
    "PerTensor",
    "Prepared",
    "Report",
    "Reshaped",
    "TwoPass",
    "WithData",
    "merge",
]

make_callable(__name__, merge)
