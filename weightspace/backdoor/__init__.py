"""Backdoors: found, located and removed from the weights."""
