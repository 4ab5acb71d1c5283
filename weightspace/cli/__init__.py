"""The command line: thin wrappers that read arguments, call the library and print tables.

A module per kind of command; ``weightspace --help`` names them in the order in which they are imported here.
"""

# isort: off
from weightspace.cli.base import app, main
from weightspace.cli import looking, training, merging, backdoors, starting  # noqa: F401

__all__ = ["app", "main"]
