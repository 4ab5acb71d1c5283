"""Learned questions: images that a metanet puts to the networks it reads.

Meta-classifiers that tune a handful of inputs and read the answers go back to Xu et al. (2021); a deep linear
generator, whose images are smooth and few in kind, makes such probes learn from few networks (Kahana et al. 2025,
"Deep Linear Probe Generators for Weight Space Learning"). Images are drawn at 16 × 16 and resized to what a network
reads, and the network is run on them by the program that its wiring was proved with, so that no symmetry changes what
it answers. One that reads no images is asked nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.errors import MetanetError, UnansweredError, WiringError
from weightspace.wiring.asking import complete
from weightspace.wiring.program import Program

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

SIDE, RANGE = 16, 3.0
"""Side of the images before they are resized, and how far their tones may be from 0, in standardised units."""
_LOUDEST, _UNIT = 20.0, 3.0


class LearnedImages(nn.Module):
    """``count`` images from a deep linear generator of codes ``(count, latent)``."""

    def __init__(self, count: int, latent: int = 32) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(count, latent))
        self.coarse = nn.Linear(latent, 64 * 16)
        self.finer = nn.Sequential(
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.Conv2d(16, 3, 3, 1, 1)
        )

    def images(self, shape: tuple[int, int, int]) -> Tensor:
        """The images ``(count, channels, height, width)`` in standardised units, within ±``RANGE``."""
        x = self.finer(self.coarse(self.codes).view(-1, 64, 4, 4))
        x = 2 * x / x.flatten(1).std(1).view(-1, 1, 1, 1).clamp_min(1e-3)
        if shape[0] != 3:
            # The mean of three channels varies less than each.
            x = 3**0.5 * x.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
        if shape[1:] != (SIDE, SIDE):
            x = F.interpolate(x, shape[1:], mode="bilinear", align_corners=False)
        found: Tensor = RANGE * torch.tanh(x / RANGE)
        return found


def image_shape(program: Program | None) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a program takes; None where it takes something else."""
    if program is None or len(program.args) != 1 or program.kwargs or not isinstance(program.args[0], Tensor):
        return None
    x = program.args[0]
    if x.dim() != 4 or not x.is_floating_point() or min(x.shape[2:]) < 4:
        return None
    return int(x.shape[1]), int(x.shape[2]), int(x.shape[3])


def together(once: Callable[[Mapping[str, Tensor]], Tensor], networks: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """What ``once`` gives for the tensors of each of some networks of one program, ``(networks, …)``."""
    if len(networks) == 1:
        return once(networks[0]).unsqueeze(0)
    stacked = {name: torch.stack([tensors[name] for tensors in networks]) for name in networks[0]}
    found: Tensor = torch.func.vmap(once, randomness="same")(stacked)
    return found


@dataclass(frozen=True, eq=False)
class Asked:
    """A network that can be run on images of ``shape`` (channels, height, width), with all tensors it takes."""

    program: Program
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int, int]

    def to(self, device: torch.device | str) -> Asked:
        return Asked(self.program, {n: t.to(device) for n, t in self.tensors.items()}, self.shape)


def asked(graph: ParameterGraph) -> Asked | None:
    """The network as something to be asked; None where it has no program or reads something other than images.

    Raises ``UnansweredError`` where a weight of it is missing.
    """
    wiring = graph.wiring
    program = wiring.program if wiring is not None else None
    shape = image_shape(program)
    if wiring is None or program is None or shape is None:
        return None
    try:
        return Asked(program, complete(wiring, {name: graph.tensor(name) for name in graph.shapes}), shape)
    except WiringError as error:
        raise UnansweredError(f"{error}; take a metanet without questions") from error


class LearnedQuestions(LearnedImages):
    """What networks answer to learned images, ``(networks, features)``; ``classes`` go by their number.

    Of every question and class the output less the mean over classes, and its share by softmax; zeros after the
    classes of a network that has fewer, and for one that is asked nothing. Raises ``MetanetError`` for one with more.
    """

    def __init__(self, count: int, classes: int) -> None:
        super().__init__(count)
        self.classes, self.features = classes, 2 * count * classes

    def forward(self, networks: Sequence[Asked | None]) -> Tensor:
        """Networks of one program are run together."""
        found = self.codes.new_zeros(len(networks), self.features)
        parts: dict[int, list[int]] = {}
        for i, network in enumerate(networks):
            if network is not None:
                parts.setdefault(id(network.program), []).append(i)
        images = {shape: self.images(shape) for shape in {n.shape for n in networks if n is not None}}
        for part in parts.values():
            own = [n for i in part if (n := networks[i]) is not None]
            found = found.index_copy(0, torch.tensor(part, device=found.device), self._read(own, images[own[0].shape]))
        return found

    def _read(self, networks: Sequence[Asked], images: Tensor) -> Tensor:
        out = _answers(networks, images).to(images.dtype)
        if out.dim() != 3 or out.shape[1] != len(images) or out.shape[2] > self.classes:
            raise MetanetError(
                f"{len(images)} images got answers of shape {tuple(out.shape[1:])} from {networks[0].program.origin}; "
                f"one row each with at most {self.classes} classes was expected: make the metanet with as many classes"
            )
        # Networks whose training diverged answer without bounds.
        out = out.nan_to_num(nan=0.0, posinf=_LOUDEST, neginf=-_LOUDEST)
        out = out - out.mean(2, keepdim=True)
        both = torch.cat(((out / _UNIT).clamp(-_LOUDEST / _UNIT, _LOUDEST / _UNIT), _UNIT * out.softmax(2)), dim=1)
        return F.pad(both, (0, self.classes - out.shape[2])).flatten(1)


def _answers(networks: Sequence[Asked], images: Tensor) -> Tensor:
    """Outputs of networks of one program for the same images, ``(networks, images, classes)``."""
    program = networks[0].program

    def once(tensors: Mapping[str, Tensor]) -> Tensor:
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), images.dtype)
        found = program.run(tensors, images.to(dtype))
        out: Tensor = found[0] if isinstance(found, tuple | list) else found
        return out

    return together(once, [n.tensors for n in networks])


__all__ = ["SIDE", "Asked", "LearnedImages", "LearnedQuestions", "asked", "image_shape", "together"]
