"""What a merging method is: a frozen dataclass of hyper-parameters in one of five shapes.

How to add one
--------------
Write ``weightspace/merge/methods/your_method.py`` with one frozen dataclass: its hyper-parameters are the fields, all
with defaults; the docstring names the paper (authors, year), gives the formula, says what each hyper-parameter is and
whether the original works per tensor or over the whole model. Then name the class in ``methods/__init__.py``, and put
it beside a reference of a few lines, written from the paper's formula, in ``tests/merge/test_methods.py``. Choose the
shape that needs least:

``Elementwise``
    ``merge(name, base, models, weights) -> Tensor``: element i of the result depends on element i of the models alone.
    It gets pieces of a flattened tensor, of any length, in any order, from several threads at once.
``PerTensor``
    the same signature with whole tensors, in their shape. Memory is that of one tensor in all models.
``TwoPass``
    ``survey(stream, weights) -> state`` reads a tensor (or, with ``scope="model"``, all of them) piece by piece, as
    often as it likes; then ``merge(piece, weights, state) -> Tensor`` gives one piece of the result. For thresholds,
    norms, inner products. A frozen dataclass with a field ``scope`` gets both ranges at once.
``Prepared``
    ``prepare(models) -> Merger`` sees all models (`Models`: lazy mappings of tensors, base, weights, data, wiring,
    seed) before the first tensor is merged, and gives the function that merges one whole tensor. For methods that
    train, align, or look across tensors. What it may keep in memory is up to it and said in its docstring.
``WithData``
    a ``Prepared`` that cannot do without ``data`` (one entry per model, or one for all: what the docstring says) and a
    proved wiring with a program: ``models.program.run(tensors, *inputs)``.

Rules for all: arithmetic happens in float32 (float64 where a model is; a method that is ``narrow`` may be asked to
compute in less); what is given must not be written to, it may
be the caller's own tensor; tensors that are not floating point never come here, nor those that are excluded, have
other shapes (but see ``any_shape``) or are not finite; random draws come from `weightspace.merge.draws` and depend on
the seed, the tensor's name and the model's place alone, so that pieces and threads change nothing. A mistake in a
hyper-parameter raises `MergeError` in ``check``. ``weights`` has one number per model, ``default_weight`` unless the
user said otherwise.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch

from weightspace.errors import MergeError, UnprovedWiringError

if TYPE_CHECKING:
    from weightspace.wiring.program import Program
    from weightspace.wiring.wiring import Wiring

Tensor = torch.Tensor
Scope = Literal["tensor", "model"]
PerModel = float | tuple[float, ...]
"""A hyper-parameter that is one number for all models, or one for each."""


@dataclass(frozen=True)
class Method(ABC):
    """A merging method with its hyper-parameters. Use one of the shapes below."""

    name: ClassVar[str]
    """What users call it: lower case, with hyphens."""
    paper: ClassVar[str]
    """Authors (year), title."""
    needs_base: ClassVar[bool] = False
    """Works on task vectors: the model that the others were fine-tuned from must be given."""
    count: ClassVar[tuple[int, int | None]] = (1, None)
    """Fewest and most models, not counting the base."""
    default_weight: ClassVar[float] = 1.0
    """Weight of each model where the user gives none."""
    needs_wiring: ClassVar[bool] = False
    """A `Prepared` method for which a wiring is looked for where none is given (True for every `WithData`)."""
    narrow: ClassVar[bool] = False
    """Can compute in bfloat16 and float16, as other programs do, where that is asked for."""
    any_shape: ClassVar[bool] = False
    """Takes models whose tensors have other shapes than the first one's (other widths)."""

    def check(self, count: int) -> None:
        """Raise `MergeError` where hyper-parameters make no sense for ``count`` models."""
        del count

    @property
    def held(self) -> int:
        """Bytes per element of a tensor that merging it may hold beyond pieces, for methods that get pieces."""
        return 0

    @property
    def in_order(self) -> bool:
        """Whether tensors must come one after the other, by name: only where another program's draws are repeated."""
        return False


@dataclass(frozen=True)
class PerTensor(Method):
    """One whole tensor at a time."""

    @abstractmethod
    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The merged tensor: ``base`` and ``models`` have its shape (see ``any_shape``), as has the result."""


@dataclass(frozen=True)
class Elementwise(PerTensor):
    """Elements do not know of each other: ``merge`` gets pieces of flattened tensors, shape (elements,)."""


State = TypeVar("State")


@dataclass(frozen=True)
class TwoPass(Method):
    """A survey, then element by element. ``scope``: what one survey covers, a tensor or the whole model."""

    scope: Scope = "tensor"

    def check(self, count: int) -> None:
        if self.scope not in ("tensor", "model"):
            raise MergeError(f"{self.name}: scope is {self.scope!r}; 'tensor' or 'model' was expected")

    @abstractmethod
    def survey(self, stream: Stream, weights: Sequence[float]) -> Any:
        """What ``merge`` needs to know, from one or several readings of all pieces."""

    @abstractmethod
    def merge(self, piece: Piece, weights: Sequence[float], state: Any) -> Tensor:
        """The merged piece, shape (elements,)."""


class Merger(Protocol):
    """Merges one whole tensor, in its shape."""

    def __call__(
        self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float], /
    ) -> Tensor: ...


@dataclass(frozen=True)
class Prepared(Method):
    """Sees all models before it merges the first tensor.

    ``prepare`` may return the merger alone, or an object that also has ``shapes: dict[str, tuple[int, ...]]`` where
    results have other shapes than the first model's (`Reshaped` is one). Tensors it has no opinion on may be handed
    to another method's ``merge``.
    """

    @abstractmethod
    def prepare(self, models: Models) -> Merger:
        """Look at the models, and return what merges one tensor."""


@dataclass(frozen=True)
class WithData(Prepared):
    """Needs ``data`` and a proved wiring with a program; what ``data`` is, the method's docstring says."""

    needs_wiring: ClassVar[bool] = True


@dataclass(frozen=True)
class Reshaped:
    """A merger whose results have shapes of their own."""

    merger: Merger
    shapes: Mapping[str, tuple[int, ...]]

    def __call__(
        self, name: str, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float], /
    ) -> Tensor:
        return self.merger(name, base, models, weights)


class Piece(Protocol):
    """Elements ``start`` to ``stop`` of one flattened tensor, in the base and in every model; loaded on access."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many models there are."""
        ...

    @property
    def base(self) -> Tensor:
        """Shape (stop - start,), float32. Not to be written to. Raises `MergeError` without a base."""
        ...

    def model(self, index: int) -> Tensor:
        """The same of a model. Not to be written to."""
        ...

    def delta(self, index: int) -> Tensor:
        """Its task vector, model minus base; the caller's own."""
        ...


class Stream(Protocol):
    """All pieces of one tensor, or of the model, in order; each iteration reads the files again."""

    count: int
    """How many models there are."""
    numel: int
    """How many elements the pieces have together."""
    names: tuple[str, ...]
    """The tensors it covers."""

    def __iter__(self) -> Iterator[Piece]: ...

    def sample(self, count: int) -> Iterator[Piece]:
        """Short pieces spread evenly, of ``count`` elements or a few more in all; without reading the rest."""
        ...


@dataclass(frozen=True, eq=False)
class Models:
    """What a `Prepared` method sees.

    ``base`` and ``models`` are lazy mappings of all tensors of the models (float or not), as they are in the files;
    ``names`` are those that are to be merged. ``float(model, name)`` gives one in float32.
    """

    base: Mapping[str, Tensor] | None
    models: tuple[Mapping[str, Tensor], ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    data: Any = None
    wiring: Wiring | None = None
    unverified: bool = False
    seed: int = 0
    progress: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    """What the method wants to say of a tensor in the report: name -> sentence."""

    @property
    def proved(self) -> Wiring:
        """The wiring. Raises `UnprovedWiringError` where there is none that was proved (or ``unverified`` was said)."""
        if self.wiring is None:
            raise UnprovedWiringError(
                "this method needs to know how the network is wired, and no wiring was given or found; "
                "give one: ws.merge(..., wiring=ws.wiring(module, inputs))"
            )
        if not self.wiring.proved and not self.unverified:
            raise UnprovedWiringError(
                "the wiring of these models is a guess that was not proved by running; "
                "give the module that they belong to, ws.wiring(module, inputs), or say unverified=True"
            )
        return self.wiring

    @property
    def program(self) -> Program:
        """The network as a function of its tensors. Raises `UnprovedWiringError` where the wiring has none."""
        program = self.proved.program
        if program is None:
            raise UnprovedWiringError(
                "this method runs the network, and this wiring has no program to run; "
                "make it from the module: ws.wiring(module, inputs)"
            )
        return program

    @staticmethod
    def float(model: Mapping[str, Tensor], name: str) -> Tensor:
        """A tensor of a model for arithmetic: float32, or float64 where it is."""
        tensor = model[name]
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)

    def data_of(self, index: int) -> Any:
        """The data of one model: its entry where ``data`` has one per model, else all of it."""
        if isinstance(self.data, (list, tuple)) and len(self.data) == len(self.models):
            return self.data[index]
        return self.data


def per_model(value: PerModel, count: int, what: str) -> tuple[float, ...]:
    """A number for each of ``count`` models. Raises `MergeError` for a wrong count of numbers."""
    if isinstance(value, (int, float)):
        return (float(value),) * count
    values = tuple(float(v) for v in value)
    if len(values) != count:
        raise MergeError(f"{what} has {len(values)} numbers for {count} models; give one number, or one per model")
    return values


def wide(values: Tensor) -> Tensor:
    """The same numbers in float32 at least."""
    return values if values.itemsize >= 4 else values.to(torch.float32)


def in_range(
    value: PerModel, low: float, high: float, what: str, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise `MergeError` unless every number lies between ``low`` and ``high``."""
    for number in value if isinstance(value, tuple) else (value,):
        good = isinstance(number, (int, float)) and (low < number or (not open_low and number == low))
        if not good or not (number < high or (not open_high and number == high)):
            raise MergeError(f"{what} is {number!r}; {low} {'<' if open_low else '≤'} {what} "
                             f"{'<' if open_high else '≤'} {high} was expected")  # fmt: skip


def hyper_parameters(method: Method) -> dict[str, Any]:
    """The hyper-parameters of a method, by name."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


Settings = Callable[[str], tuple[Method, tuple[float, ...]]]
"""Method and weights for a tensor: recipes may set hyper-parameters by tensor."""
