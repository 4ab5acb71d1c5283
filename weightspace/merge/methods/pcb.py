"""PCB: parameters compete, within a task and between tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightspace.merge.method import Piece, Stream, Tensor, TwoPass, in_range
from weightspace.merge.methods.ties import ranked
from weightspace.merge.select import kth_largest

_CLIPPED = 1e-4  # share of magnitudes that is clipped at either end, against outliers


@dataclass(frozen=True)
class _State:
    low: float
    high: float
    least: float
    most: float


@dataclass(frozen=True)
class Pcb(TwoPass):
    """θ₀ + λ Σ wᵢ βᵢ ⊙ τᵢ / Σ βᵢ (Du et al. 2024, "Parameter Competition Balancing for model merging").

    βᵢ = exp(N · norm(|τᵢ|)²) · tanh(τᵢ ⊙ Σⱼ τⱼ): how large an element is in its own task, and whether the others agree.
    Of each task's β the ``density`` largest are kept and brought to [0, 1] by the least and the largest of them; the
    others get 0. norm brings magnitudes, clipped at their 10⁻⁴ quantiles, to [0, 1]. As the authors' program does it,
    with tanh for the paper's softmax over tasks.

    The original works over the whole model: ``scope="model"``. Per tensor is the default.

    ``density``: the paper's mask ratio r, 0.1 in its experiments on vision. ``scale``: λ, between 0.8 and 1.2 there.
    """

    density: float = 0.1
    scale: float = 1.0

    name: ClassVar[str] = "pcb"
    paper: ClassVar[str] = "Du et al. (2024), Parameter Competition Balancing"
    needs_base: ClassVar[bool] = True

    def check(self, count: int) -> None:
        super().check(count)
        in_range(self.density, 0, 1, "density", open_low=True)

    def survey(self, stream: Stream, weights: Sequence[float]) -> tuple[_State, ...]:
        n = stream.numel
        states = []
        for i in range(stream.count):
            # The places that sorting in ascending order and indexing would give, counted from above.
            low = ranked(stream, i, n - int(n * _CLIPPED))
            high = ranked(stream, i, n - max(0, int(n * (1 - _CLIPPED) - 1)))
            half = _State(low, high, 0.0, 0.0)

            def drawn(i: int = i, half: _State = half) -> Tensor:
                return torch.cat([self._score(piece, i, half) for piece in stream.sample(1 << 16)])

            def lazily(i: int = i, half: _State = half) -> Iterator[Tensor]:
                return (self._score(piece, i, half) for piece in stream)

            least = kth_largest(lazily, n, n - min(n - 1, int(n * (1 - self.density))), drawn)
            most = max(float(score.max()) for score in lazily())
            states.append(_State(low, high, least, most))
        return tuple(states)

    def merge(self, piece: Piece, weights: Sequence[float], state: tuple[_State, ...]) -> Tensor:
        mixed, total = torch.zeros_like(piece.base), torch.zeros_like(piece.base)
        for i, (own, weight) in enumerate(zip(state, weights, strict=True)):
            share = self._score(piece, i, own).sub_(own.least).clamp_min_(0)
            if own.most > own.least:
                share.div_(own.most - own.least)
            delta = piece.delta(i)
            clipped = torch.copysign(delta.abs().clamp_(own.low, own.high), delta).mul_(delta != 0)
            mixed.addcmul_(clipped, share, value=weight)
            total.add_(share)
        return mixed.div_(total.clamp_min_(1e-12)).mul_(self.scale).add_(piece.base)

    def _score(self, piece: Piece, index: int, state: _State) -> Tensor:
        everyone = [piece.delta(i) for i in range(piece.count)]
        own = everyone[index]
        span = state.high - state.low
        size = own.abs().clamp_(state.low, state.high).sub_(state.low).div_(span if span > 0 else 1)
        total = torch.stack(everyone).sum(0)
        return size.square_().mul_(piece.count).exp_().mul_(total.mul_(own).tanh_())
