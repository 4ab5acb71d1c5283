"""Which tensors of a nested object are the model.

A training script may save a state dict, a dictionary that holds one beside the optimiser's state, a
whole module, or several networks. The rule, in this order:

1. A caller's ``key`` (a dotted path) decides alone.
2. Parts that are an optimiser's, a scheduler's or a gradient scaler's (by their key, or because they
   hold ``state`` and ``param_groups``) are counted, never part of the mapping.
3. If what remains is one part that holds tensors, that part is the model and its key is dropped, and
   so on inward: ``{"state_dict": {...}, "epoch": 3}`` yields the names inside ``state_dict``.
4. Under a well-known key (``state_dict``, ``model`` ...) beside loose tensors (a mean, an accuracy) the
   part under the key is the model; the loose tensors are listed in the findings.
5. Otherwise all parts belong together (several networks, or nested modules) and keep their keys as
   prefixes.

What is not a tensor goes to the metadata.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from weightspace.checkpoint.limits import MAX_DEPTH, MAX_NODES
from weightspace.checkpoint.pickles import ArrayRef, Global, Record, SparseRef, TensorRef
from weightspace.errors import CheckpointError, UnsafeCheckpointError

MODEL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model_dict",
    "modelstate",
    "model",
    "net",
    "network",
    "net_state_dict",
    "net_dict",
    "state",
    "weights",
    "params",
    "parameters",
    "module",
)
_OPTIMISER = re.compile(r"optim|(^|_)opt(_|$)|opt_state|scheduler|(^|_)sched(_|$)|(grad_|amp_|^)scaler|^amp$", re.I)
_CONFIG_KEYS = ("config", "cfg", "args", "hparams", "hyper_parameters", "opt", "kwargs", "model_args", "params")
_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")

Leaf = TensorRef | ArrayRef | SparseRef


@dataclass
class Choice:
    """The model's tensors by name, and what was beside them."""

    tensors: dict[str, Leaf]
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)


def choose(root: Any, key: str | None = None, separator: str = ".", through: tuple[str, ...] | None = None) -> Choice:
    """Pick the model out of ``root`` as the module's docstring says.

    ``through`` limits step 3 to these keys, for formats whose own nesting is the model's.
    """
    choice = Choice({})
    walk = _Walk()
    path: list[str] = []
    if key is not None:
        for part in _split_key(root, key, walk):
            root = dict(walk.children(root))[part]
            path.append(part)
    else:
        root = _descend(root, path, walk, choice, separator, through)
    if isinstance(root, Leaf):
        choice.tensors["tensor"] = root
    else:
        if isinstance(root, Record) and _is_module(root):
            choice.findings.append(
                f"whole pickled module of class {root.type_name}: read from its records, the class was not loaded"
            )
        for name, leaf in walk.leaves(root, separator):
            if name in choice.tensors:
                raise CheckpointError(f"two tensors would be called {name!r}; choose a part with key=...")
            choice.tensors[name] = leaf
    if path:
        choice.metadata["key"] = ".".join(path)
    _strip(choice)
    for name in walk.not_in_state:
        choice.findings.append(f"tensor {name} is an attribute of a module outside its state and was left out")
    for name in walk.training_state:
        choice.findings.append(f"training state under {name!r} is not part of the mapping")
    for kind in walk.odd_containers:
        choice.findings.append(f"tensors were found inside an object of the unknown class {kind}")
    return choice


def _descend(
    root: Any, path: list[str], walk: _Walk, choice: Choice, separator: str, through: tuple[str, ...] | None
) -> Any:
    while not isinstance(root, Leaf) and not (isinstance(root, Record) and _is_module(root)) and len(path) < 20:
        parts = walk.children(root)
        if not parts:
            break
        models: list[tuple[str, Any]] = []
        loose: list[tuple[str, Leaf]] = []
        rest: dict[str, Any] = {}
        for name, value in parts:
            if isinstance(value, Leaf):
                loose.append((name, value))
                continue
            tensors, size = walk.census(value)
            if not tensors:
                rest[name] = value
            elif _is_optimiser(name, value):
                choice.metadata.setdefault("optimizer", {})[separator.join([*path, name])] = {
                    "tensors": tensors,
                    "parameters": size,
                }
                choice.findings.append(
                    f"{tensors} tensors of training state under {name!r} are counted but not part of the mapping"
                )
            else:
                models.append((name, value))
        _describe(rest, choice)
        named = [(n, v) for n, v in models if n.lower() in MODEL_KEYS]
        scalars_only = all(_numel(leaf) <= 1 for _, leaf in loose)
        single = len(models) == 1 and (through is None or models[0][0] in through)
        if single and (not loose or named or scalars_only):
            chosen = models[0]
        else:
            kept = {name for name, _ in models} | {name for name, _ in loose}
            return root if len(kept) == len(parts) else {name: part for name, part in parts if name in kept}
        for name, leaf in loose:
            choice.findings.append(f"tensor {name!r} {_shape(leaf)} lies beside the model and was left out")
        path.append(chosen[0])
        root = chosen[1]
    return root


def _split_key(root: Any, key: str, walk: _Walk) -> Iterator[str]:
    # A key may itself contain dots, so the longest child name that fits is taken.
    rest = key
    while rest:
        names = [name for name, _ in walk.children(root)]
        fits = [n for n in names if rest == n or rest.startswith(n + ".")]
        if not fits:
            raise CheckpointError(f"there is no {key!r} in the file; at {rest!r} there are: {', '.join(names[:20])}")
        name = max(fits, key=len)
        yield name
        root = dict(walk.children(root))[name]
        rest = rest[len(name) + 1 :]


def _has_groups(value: Any) -> bool:
    if isinstance(value, Record):
        return value.type_name.startswith("torch.optim.") or (
            isinstance(value.state, dict) and "param_groups" in value.state
        )
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, dict) and "param_groups" in v for v in value)
    return isinstance(value, dict) and "param_groups" in value


def _is_optimiser(name: str, value: Any) -> bool:
    if _has_groups(value):
        return True
    return bool(_OPTIMISER.search(name)) and not (isinstance(value, Record) and _is_module(value))


def _is_module(record: Record) -> bool:
    return isinstance(record.state, dict) and ("_modules" in record.state or "_parameters" in record.state)


def _numel(leaf: Leaf) -> int:
    return math.prod(leaf.shape) if len(leaf.shape) <= 64 else 2


def _shape(leaf: Leaf) -> str:
    return f"of shape {tuple(leaf.shape)[:8]}"


def _strip(choice: Choice) -> None:
    again = True
    while again and len(choice.tensors) > 0:
        again = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) and len(name) > len(prefix) for name in choice.tensors):
                choice.tensors = {name[len(prefix) :]: leaf for name, leaf in choice.tensors.items()}
                choice.findings.append(f"prefix {prefix!r} of all names was stripped (a wrapper of the trainer)")
                again = True
    for prefix in _PREFIXES:
        some = sum(name.startswith(prefix) for name in choice.tensors)
        if 0 < some < len(choice.tensors):
            choice.findings.append(f"{some} of {len(choice.tensors)} names begin with {prefix!r}; kept as they are")


class _Walk:
    """Looks through nested objects with a common budget of visits."""

    def __init__(self) -> None:
        self.visits = 0
        self.not_in_state: list[str] = []
        self.training_state: list[str] = []
        self.odd_containers: dict[str, None] = {}
        self._census: dict[int, tuple[int, int]] = {}

    def _visit(self, depth: int) -> None:
        self.visits += 1
        if self.visits > MAX_NODES or depth > MAX_DEPTH:
            raise UnsafeCheckpointError(
                f"the objects in the file are nested deeper than {MAX_DEPTH} or number more than {MAX_NODES:,}"
            )

    def children(self, value: Any) -> list[tuple[str, Any]]:
        """Named parts of a container; none for anything else."""
        if isinstance(value, dict):
            return [(_name(k), v) for k, v in value.items()]
        if isinstance(value, list | tuple):
            return [(str(i), v) for i, v in enumerate(value)]
        if isinstance(value, Record):
            if _is_module(value):
                return self._module(value)
            found: list[tuple[str, Any]] = []
            if value.state is not None and not isinstance(value.state, Leaf | str | bytes | int | float):
                found += self.children(value.state)
            elif isinstance(value.state, Leaf):
                found.append(("state", value.state))
            found += [(_name(k), v) for k, v in value.pairs.items()]
            found += [(str(i), v) for i, v in enumerate(value.items)]
            if not found and not isinstance(value.made_by, Record):
                found = [(str(i), v) for i, v in enumerate(value.args)]
            return found
        return []

    def _module(self, record: Record) -> list[tuple[str, Any]]:
        state: dict[Any, Any] = record.state
        skip = state.get("_non_persistent_buffers_set") or ()
        skip = {s for s in skip if isinstance(s, str)} if isinstance(skip, list | tuple) else set()
        found: list[tuple[str, Any]] = []
        for kind in ("_parameters", "_buffers", "_modules"):
            part = state.get(kind)
            part = part.pairs if isinstance(part, Record) else part
            if isinstance(part, dict):
                found += [(_name(k), v) for k, v in part.items() if not (kind == "_buffers" and k in skip)]
        return found

    def census(self, value: Any, depth: int = 0, active: frozenset[int] = frozenset()) -> tuple[int, int]:
        """How many tensors and elements are inside (shared objects are looked into once)."""
        self._visit(depth)
        if isinstance(value, Leaf):
            return 1, _numel(value)
        if not isinstance(value, dict | list | tuple | Record) or id(value) in active:
            return 0, 0
        known = self._census.get(id(value))
        if known is not None:
            return known
        inside = active | {id(value)}
        tensors = size = 0
        for _, part in self.children(value):
            if isinstance(part, Leaf | dict | list | tuple | Record):
                more, much = self.census(part, depth + 1, inside)
                tensors, size = tensors + more, size + much
        self._census[id(value)] = tensors, size
        return tensors, size

    def leaves(self, value: Any, separator: str) -> Iterator[tuple[str, Leaf]]:
        """All tensors below ``value`` with their joined names, in file order."""
        yield from self._leaves(value, "", separator, 0, frozenset())

    def _leaves(
        self, value: Any, prefix: str, separator: str, depth: int, active: frozenset[int]
    ) -> Iterator[tuple[str, Leaf]]:
        self._visit(depth)
        if id(value) in active:
            return
        if isinstance(value, Record):
            if _is_module(value):
                for name, part in value.state.items():
                    if isinstance(part, Leaf) and isinstance(name, str):
                        self.not_in_state.append(prefix + name)
            elif self.census(value)[0]:
                self.odd_containers[value.type_name] = None
        inside = active | {id(value)}
        for name, part in self.children(value):
            full = f"{prefix}{name}"
            if len(full) > 4096:
                raise UnsafeCheckpointError("a tensor's name has more than 4096 letters")
            if isinstance(part, Leaf):
                yield full, part
            elif isinstance(part, dict | list | tuple | Record) and self.census(part, depth)[0]:
                if _has_groups(part):
                    self.training_state.append(full)
                    continue
                yield from self._leaves(part, full + separator, separator, depth + 1, inside)


def _name(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, bytes):
        return key.decode("utf-8", "replace")
    if isinstance(key, int) and key.bit_length() > 256:
        raise UnsafeCheckpointError("a dictionary key is a number of more than 256 bits")
    if isinstance(key, tuple):
        return "_".join(_name(part) for part in key)
    return str(key)


def _describe(rest: dict[str, Any], choice: Choice) -> None:
    for name, value in rest.items():
        plain_value = plain(value)
        choice.metadata.setdefault(name, plain_value)
        if choice.config is None and name in _CONFIG_KEYS and isinstance(plain_value, dict) and plain_value:
            choice.config = plain_value


def plain(value: Any, budget: list[int] | None = None, depth: int = 0) -> Any:
    """A value with records as dictionaries or class names; long or deep parts are cut with ``...``."""
    budget = [10_000] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth > 12:
        return "..."
    if isinstance(value, str):
        return value if len(value) <= 1 << 16 else value[: 1 << 16] + "..."
    if isinstance(value, int) and value.bit_length() > 256:
        return "..."
    if isinstance(value, bool | int | float | complex | None):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        return {_name(k): plain(v, budget, depth + 1) for k, v in _few(value.items(), budget)}
    if isinstance(value, list | tuple):
        return [plain(v, budget, depth + 1) for v in _few(value, budget)]
    if isinstance(value, Global):
        return str(value)
    if isinstance(value, Record):
        if isinstance(value.state, dict) and value.state and not _is_module(value):
            return plain(value.state, budget, depth + 1)
        if value.pairs:
            return plain(value.pairs, budget, depth + 1)
        if value.items:
            return plain(value.items, budget, depth + 1)
        if len(value.args) == 1 and isinstance(value.args[0], str | int | float):
            return plain(value.args[0], budget, depth + 1)
        return f"<{value.type_name}>"
    return f"<{type(value).__name__}>"


def _few(values: Any, budget: list[int]) -> Iterator[Any]:
    for value in values:
        if budget[0] < 0:
            return
        yield value
