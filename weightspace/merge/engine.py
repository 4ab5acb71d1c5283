"""Runs a plan: reads pieces, hands them to the method, checks the result and passes it to a sink.

Memory: methods that work element by element hold pieces of 2¹⁸ elements per thread, whatever the size of tensors;
methods that need whole tensors hold those that the threads are at, where a large one runs alone (``_BUDGET``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from math import isfinite
from threading import Condition, Event
from typing import Any, Protocol

import torch

from weightspace.errors import MergeError
from weightspace.merge.method import Elementwise, Merger, Method, Models, PerTensor, Prepared, Settings, TwoPass
from weightspace.merge.sources import Action, Model, Plan

Tensor = torch.Tensor
CHUNK = 1 << 18
"""Elements of a piece: a megabyte in float32, so that the few arrays of one step stay in the cache."""

_BUDGET = 512 << 20  # bytes of whole tensors that several threads may hold together
_WINDOW = 4  # pieces that are mapped at once
_SAMPLES = 64
_KEEP = 24 << 20


class Sink(Protocol):
    """Takes results."""

    def write(self, name: str, start: int, values: Tensor) -> None: ...


class Reader:
    """One tensor of one model in the type ``work`` of the arithmetic, checked to be finite when first read."""

    def __init__(self, model: Model, name: str, work: torch.dtype, check: bool = True) -> None:
        self.model, self.name, self.work = model, name, work
        self.shape = model.shapes[name]
        self._parts = model.reads_parts(name)
        self._loaded: Tensor | None = None
        self._numel = torch.Size(self.shape).numel()
        self._checked = 0 if check else self._numel
        self._window: tuple[int, int, Tensor] | None = None

    def unchecked(self) -> Reader:
        """Another reader of the same, which leaves the check to this one."""
        return Reader(self.model, self.name, self.work, check=False)

    def part(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor. Not to be written to."""
        if self._parts:
            raw = self._mapped(start, stop)
        else:
            if self._loaded is None:
                self._loaded = self.model.whole(self.name).reshape(-1)
            raw = self._loaded[start:stop]
        values = raw.to(self.work)
        if stop > self._checked:
            self._finite(values)
            if start <= self._checked:
                self._checked = stop
        return values

    def _mapped(self, start: int, stop: int) -> Tensor:
        # Opening and mapping cost as much as the arithmetic on a piece, so several are mapped together.
        if self._window is None or start < self._window[0] or stop > self._window[1]:
            end = min(self._numel, max(stop, start + _WINDOW * CHUNK if stop - start >= CHUNK // 2 else stop))
            self._window = (start, end, self.model.part(self.name, start, end))
        first, _, held = self._window
        return held[start - first : stop - first]

    def whole(self) -> Tensor:
        """The tensor in its shape. Not to be written to."""
        values = self.model.whole(self.name).to(self.work)
        if self._checked < values.numel():
            self._finite(values)
            self._checked = values.numel()
        return values

    def _finite(self, values: Tensor) -> None:
        # A sum is one quick pass; only where it is odd are the elements looked at.
        if not isfinite(float(values.sum(dtype=max(values.dtype, torch.float32, key=lambda d: d.itemsize)))):
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                raise MergeError(
                    f"{self.name}: {bad:,} elements of {self.model.label} are NaN or infinite; nothing was written. "
                    f"Repair the model, or copy the tensor of the base (or first model) with exclude=[{self.name!r}]"
                )


class PieceOf:
    """A `Piece`: elements of a tensor in base and models, loaded when they are asked for."""

    __slots__ = ("_base", "_readers", "name", "shape", "start", "stop")

    def __init__(self, name: str, base: Reader | None, readers: Sequence[Reader], start: int, stop: int) -> None:
        self.name, self.shape = name, readers[0].shape
        self._base, self._readers = base, readers
        self.start, self.stop = start, stop

    @property
    def count(self) -> int:
        return len(self._readers)

    @property
    def base(self) -> Tensor:
        if self._base is None:
            raise MergeError(f"{self.name}: this method needs the base of all models; give base=")
        return self._base.part(self.start, self.stop)

    def model(self, index: int) -> Tensor:
        return self._readers[index].part(self.start, self.stop)

    def delta(self, index: int) -> Tensor:
        return self.model(index) - self.base


class StreamOf:
    """A `Stream` over one or more tensors."""

    def __init__(
        self, tensors: Sequence[tuple[str, Reader | None, Sequence[Reader]]], chunk: int, stop: Event
    ) -> None:
        self._tensors, self._chunk, self._stop = tensors, chunk, stop
        self.count = len(tensors[0][2])
        self.names = tuple(name for name, _, _ in tensors)
        self.numel = sum(torch.Size(readers[0].shape).numel() for _, _, readers in tensors)

    def __iter__(self) -> Iterator[PieceOf]:
        for name, base, readers in self._tensors:
            total = torch.Size(readers[0].shape).numel()
            for start in range(0, total, self._chunk):
                _check(self._stop)
                yield PieceOf(name, base, readers, start, min(start + self._chunk, total))

    def sample(self, count: int) -> Iterator[PieceOf]:
        """Short pieces spread evenly over the stream, ``count`` elements or a few more in all."""
        pieces = min(_SAMPLES, max(1, self.numel // 16))
        unchecked = [(n, base and base.unchecked(), [r.unchecked() for r in rs]) for n, base, rs in self._tensors]
        length = max(16, -(-count // pieces))
        stride = max(self.numel // pieces, 1)
        at, wanted = 0, stride // 2
        for name, base, readers in unchecked:
            total = torch.Size(readers[0].shape).numel()
            while wanted < at + total:
                start = min(wanted - at, max(0, total - length))
                yield PieceOf(name, base, readers, start, min(start + length, total))
                wanted += max(stride, 1)
            at += total


class Run:
    """One merge: models, plan, method and sink. ``go`` does it."""

    def __init__(
        self,
        plan: Plan,
        base: Model | None,
        models: Sequence[Model],
        settings: Settings,
        sink: Sink,
        *,
        chunk: int = CHUNK,
        threads: int | None = None,
        compute: torch.dtype = torch.float32,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.plan, self.base, self.models, self.settings, self.sink = plan, base, list(models), settings, sink
        self.chunk, self.step, self.compute = chunk, step, compute
        self.threads = threads or min(2, os.cpu_count() or 1)
        self._stop = Event()
        self._room = _Room(_BUDGET)
        self._shared: Any = None  # the state of a survey over the whole model, or a Merger

    def go(self, method: Method, prepared: Merger | None = None) -> None:
        """Merge and copy everything. The first error stops all threads and is raised."""
        before = torch.get_num_threads()
        # Pieces of a megabyte come and go. The C library gives such memory back at once, to fault it in again, until
        # a larger block has been freed: this one costs nothing, for it is never touched.
        torch.empty(_KEEP, dtype=torch.uint8)
        work = [a for a in self.plan.actions if a.same_as is None]
        if method.in_order:
            work.sort(key=lambda a: a.name)
            self.threads = 1
        else:
            work.sort(key=lambda a: -a.numel)  # the long ones first, so that no thread is left with one at the end
        try:
            if self.threads > 1:
                # Each thread computes alone: threads of their own inside each operation would only get in the way.
                torch.set_num_threads(max(1, before // self.threads))
            with torch.no_grad():
                if isinstance(method, TwoPass) and method.scope == "model":
                    todo = [a for a in self.plan.merged if a.same_as is None]
                    stream = StreamOf([self._readers(a) for a in todo], self.chunk, self._stop)
                    self._shared = method.survey(stream, self.settings(todo[0].name)[1])
            self._shared = prepared if prepared is not None else self._shared
            if self.threads == 1:
                for action in work:
                    self._one(action)
            else:
                self._parallel(work)
        finally:
            torch.set_num_threads(before)

    def _parallel(self, work: Sequence[Action]) -> None:
        with ThreadPoolExecutor(self.threads, thread_name_prefix="merge") as pool:
            futures = [pool.submit(self._one, action) for action in work]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _one(self, action: Action) -> None:
        _check(self._stop)
        with torch.no_grad():
            if action.source is not None:
                self._copy(action)
            else:
                self._merge(action)
        self.step(action.name)
        for other in self.plan.actions:
            if other.same_as == action.name:
                self.step(other.name)

    def _copy(self, action: Action) -> None:
        assert action.source is not None
        model, name = action.source, action.name
        if not model.reads_parts(name):
            self.sink.write(name, 0, model.whole(name).to(action.dtype).reshape(-1))
            return
        step = 8 * self.chunk
        for start in range(0, action.numel, step):
            stop = min(start + step, action.numel)
            self.sink.write(name, start, model.part(name, start, stop).to(action.dtype))

    def _merge(self, action: Action) -> None:
        method, weights = self.settings(action.name)
        name, base, readers = self._readers(action)
        everyone = [*([base] if base else []), *readers]
        whole = 8 * action.numel * (len(everyone) + 2)
        held = action.numel * (method.held + 4 * sum(not r.model.reads_parts(name) for r in everyone))
        if isinstance(method, Elementwise):
            with self._room.take(held):
                for piece in StreamOf([(name, base, readers)], self.chunk, self._stop):
                    given = piece.base if base else None
                    parts = [piece.model(i) for i in range(len(readers))]
                    self._put(action, piece.start, method.merge(name, given, parts, weights))
        elif isinstance(method, TwoPass):
            with self._room.take(held):
                stream = StreamOf([(name, base, readers)], self.chunk, self._stop)
                state = self._shared if method.scope == "model" else method.survey(stream, weights)
                for piece in stream:
                    self._put(action, piece.start, method.merge(piece, weights, state))
        else:
            with self._room.take(whole):
                given = base.whole() if base else None
                tensors = [r.whole() for r in readers]
                if isinstance(method, PerTensor):
                    result = method.merge(name, given, tensors, weights)
                else:
                    assert isinstance(method, Prepared)
                    # A prepared method may have learned its numbers with gradients; its merger does not need them.
                    result = self._shared(name, given, tensors, weights)
                if tuple(result.shape) != action.shape:
                    raise MergeError(
                        f"{name}: {method.name} gave the shape {list(result.shape)}, {list(action.shape)} was expected"
                    )
                self._put(action, 0, result.reshape(-1))

    def _readers(self, action: Action) -> tuple[str, Reader | None, list[Reader]]:
        name = action.name
        kinds = [m.dtypes[name] for m in [*([self.base] if self.base else []), *self.models] if name in m.dtypes]
        work = torch.float64 if torch.float64 in kinds else self.compute
        base = Reader(self.base, name, work) if self.base and name in self.base.shapes else None
        return name, base, [Reader(m, name, work) for m in self.models]

    def _put(self, action: Action, start: int, values: Tensor) -> None:
        result = values.to(action.dtype)
        if not isfinite(float(result.sum(dtype=torch.float32))) and not bool(torch.isfinite(result).all()):
            largest = float(values.abs().max())
            kind = str(action.dtype).removeprefix("torch.")
            raise MergeError(
                f"{action.name}: the result has values up to {largest:.3g}, which {kind} cannot hold; nothing was "
                "written. Give smaller weights, or a wider type with dtype='float32'"
            )
        self.sink.write(action.name, start, result)
        for other in self.plan.actions if self._tied else ():
            if other.same_as == action.name:
                self.sink.write(other.name, start, result.to(other.dtype))

    @property
    def _tied(self) -> bool:
        return any(a.same_as is not None for a in self.plan.actions)


def prepare(
    method: Prepared, base: Model | None, models: Sequence[Model], plan: Plan, weights: tuple[float, ...], **more: Any
) -> tuple[Merger, Plan, dict[str, str]]:
    """Let a method look at all models: its merger, the plan with the shapes it gives, and its notes."""
    seen = Models(
        base.tensors if base else None, tuple(m.tensors for m in models),
        tuple(a.name for a in plan.merged if a.same_as is None), weights, **more,
    )  # fmt: skip
    merger = method.prepare(seen)
    shapes = getattr(merger, "shapes", {})
    actions = [replace(a, shape=tuple(shapes.get(a.same_as or a.name, a.shape))) for a in plan.actions]
    return merger, Plan(actions, plan.left_out), seen.notes


class _Room:
    """Lets threads take memory up to a limit together; one that needs more than all of it waits to be alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._changed = limit, 0, Condition()

    def take(self, size: int) -> _Taken:
        return _Taken(self, size)

    def enter(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not size or self._used == 0 or self._used + size <= self._limit)
            self._used += size

    def leave(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()


class _Taken:
    def __init__(self, room: _Room, size: int) -> None:
        self._room, self._size = room, size

    def __enter__(self) -> None:
        self._room.enter(self._size)

    def __exit__(self, *_: object) -> None:
        self._room.leave(self._size)


class _Stopped(Exception):
    """Another thread failed, or the user interrupted."""


def _check(stop: Event) -> None:
    if stop.is_set():
        raise _Stopped
