"""What weightspace raises. Every message says what was found, what was expected and what to do."""

from __future__ import annotations


class WeightspaceError(Exception):
    """Base of every error that weightspace raises on purpose."""


class CheckpointError(WeightspaceError):
    """A file could not be read as a checkpoint: truncated, malformed or empty."""


class UnsafeCheckpointError(CheckpointError):
    """A file asks for something no checkpoint needs: running code, absurd sizes, leaving its folder."""


class UnknownFormatError(CheckpointError):
    """The content of a file matches none of the readers."""


class MissingExtraError(WeightspaceError, ImportError):
    """A format or feature needs an optional package; the message names the install command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'weightspace[{extra}]'"
        )
        self.package = package
        self.extra = extra


class WiringError(WeightspaceError):
    """A network could not be wired, or a wiring was used on tensors it does not describe."""


class UnprovedWiringError(WiringError):
    """An operation that needs a proved wiring was given one that is not."""


class GraphError(WeightspaceError):
    """A parameter graph could not be built, exported or read back."""


class ZooError(WeightspaceError):
    """A zoo's index could not be read or written, or a question asked of it makes no sense."""


class MetanetError(WeightspaceError):
    """A metanetwork was given an option, a network or a set of samples that it cannot use."""


class UnansweredError(MetanetError):
    """A network that a metanet would run, and that cannot be run."""


class MergeError(WeightspaceError):
    """Models that cannot be merged as asked, or a method or recipe that makes no sense; nothing was written."""


class AlignmentError(WeightspaceError):
    """Two networks cannot be aligned as asked: other names or shapes, numbers that are not finite, a wrong option."""
