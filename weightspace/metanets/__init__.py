"""Metanetworks: networks that read networks, equivariant to the symmetries of what they read."""

from weightspace.metanets.base import Metanet, build_metanet

__all__ = ["Metanet", "build_metanet"]
