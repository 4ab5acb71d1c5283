"""A pickle machine that computes data and runs nothing.

It executes the instructions of a pickle on its own stack, without importing or calling what the
pickle names. A class or function that it does not know becomes a `Record`: the name, the arguments
and the state, inert. What torch and numpy need to describe tensors is understood natively and becomes
a `TensorRef` or an `ArrayRef`, without its bytes. A pickle that so much as names something that could
run code (`os.system`, `builtins.eval`, ...) is refused.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING as _PYTHON_2_MODULES
from _compat_pickle import NAME_MAPPING as _PYTHON_2_NAMES
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from weightspace.checkpoint import dtypes
from weightspace.checkpoint.limits import MAX_NDIM, MAX_OPCODES
from weightspace.checkpoint.source import Source
from weightspace.errors import CheckpointError, UnsafeCheckpointError


def _words(text: str) -> list[str]:
    return text.split()


# Modules no checkpoint has a reason to name, and functions elsewhere that run code or touch files. Names
# that people also give to packages of their own (code, trace, ...) are listed by function.
_DANGEROUS_MODULES = frozenset(
    _words("""os posix nt posixpath ntpath sys subprocess shutil socket ssl ctypes _ctypes cffi pty tty
    runpy importlib _frozen_importlib _imp imp pkgutil zipimport codeop marshal pickle _pickle cPickle
    dill shelve popen2 webbrowser urllib urllib2 requests http httplib ftplib smtplib telnetlib
    xmlrpc socketserver asyncio multiprocessing _thread threading concurrent faulthandler
    pdb bdb cProfile pstats timeit doctest unittest pydoc pip setuptools distutils venv
    ensurepip atexit tempfile fileinput linecache antigravity idlelib lib2to3 sqlite3 aiohttp fsspec
    _posixsubprocess _socket _io io mmap readline nturl2path""")
)
_DANGEROUS_NAMES = frozenset(
    _words("""builtins.eval builtins.exec builtins.compile builtins.open builtins.__import__ builtins.execfile
    builtins.apply builtins.input builtins.breakpoint builtins.globals builtins.locals builtins.vars
    builtins.setattr builtins.delattr builtins.help builtins.exit builtins.quit builtins.memoryview
    builtins.map builtins.filter builtins.reload builtins.file builtins.raw_input
    operator.attrgetter operator.methodcaller operator.itemgetter _operator.attrgetter _operator.methodcaller
    code.interact code.InteractiveInterpreter code.InteractiveConsole inspect.getattr_static
    profile.run trace.Trace platform.popen commands.getoutput signal.signal gc.get_objects glob.glob
    types.CodeType types.FunctionType types.ModuleType functools.reduce torch.load torch.compile
    torch.hub.load torch.hub.load_state_dict_from_url torch.jit.load torch.jit.save torch.save
    torch.serialization.load torch.utils.cpp_extension.load torch.utils.cpp_extension.load_inline
    torch.ops.load_library torch.classes.load_library torch._C._jit_pass_inline
    numpy.load numpy.save numpy.fromfile numpy.memmap numpy.ctypeslib.load_library
    numpy.testing._private.utils.runstring joblib.load pandas.eval pandas.read_pickle""")
)
# Functions from which cloudpickle and friends rebuild live code: inert here, but worth a finding.
_CODE_CARRIERS = frozenset({"cloudpickle", "torch.package", "torch.fx"})


@dataclass(frozen=True)
class Global:
    """A name a pickle refers to; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a class that is not loaded: what it was made from, and its state."""

    made_by: Any
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)

    @property
    def type_name(self) -> str:
        """The class (or function) that would have made the object."""
        if isinstance(self.made_by, Record):
            return self.made_by.type_name
        if str(self.made_by) in ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__"):
            return str(self.args[0]) if self.args else str(self.made_by)
        return str(self.made_by)

    def __repr__(self) -> str:
        return f"<{self.type_name}>"


@dataclass(frozen=True, eq=False)
class StorageRef:
    """A block of elements elsewhere in the file."""

    key: str
    dtype: torch.dtype
    numel: int
    location: str = "cpu"
    offset: int = 0  # elements into the storage, where this is a view of another


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A strided view of a storage, described but not loaded."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    quantizer: tuple[Any, ...] | None = None


@dataclass(frozen=True, eq=False)
class SparseRef:
    """A sparse tensor in coordinate form."""

    indices: TensorRef
    values: TensorRef
    shape: tuple[int, ...]


@dataclass(eq=False)
class ArrayRef:
    """A numpy array with its bytes."""

    dtype: Any = None
    shape: tuple[int, ...] = ()
    data: bytes = b""
    fortran: bool = False


@dataclass(eq=False)
class _Dtype:
    text: str
    order: str = "="

    def numpy(self) -> np.dtype[Any] | None:
        dtype = dtypes.numpy_dtype(self.text)
        return dtype.newbyteorder(">") if dtype is not None and self.order == ">" else dtype


class _Mark:
    pass


_MARK = _Mark()


@dataclass
class Cursor:
    """A place in a source, moving forward."""

    source: Source
    at: int = 0
    _block: bytes = b""
    _start: int = 0

    def take(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        begin = self.at - self._start
        if begin >= 0 and begin + length <= len(self._block):
            self.at += length
            return self._block[begin : begin + length]
        self.source.check(self.at, length, "the pickle")
        if length > 1 << 16:
            data = self.source.read(self.at, length)
            self.at += length
            return data
        self._start = self.at
        self._block = self.source.read(self.at, min(1 << 20, self.source.size - self.at))
        self.at += length
        return self._block[:length]

    def line(self) -> bytes:
        """The bytes up to the next newline, which is skipped."""
        pieces = []
        while True:
            if not 0 <= self.at - self._start < len(self._block):
                self.take(1)
                self.at -= 1
            begin = self.at - self._start
            end = self._block.find(b"\n", begin)
            if end >= 0:
                pieces.append(self._block[begin:end])
                self.at = self._start + end + 1
                return b"".join(pieces)
            pieces.append(self._block[begin:])
            self.at = self._start + len(self._block)


@dataclass
class Report:
    """What a pickle was made of, beside its value."""

    globals: dict[str, None] = field(default_factory=dict)
    odd: dict[str, None] = field(default_factory=dict)
    locations: dict[str, None] = field(default_factory=dict)
    data_less: int = 0


def load(
    cursor: Cursor,
    report: Report,
    persistent: Callable[[Any], Any] | None = None,
    nested: Callable[[bytes], Any] | None = None,
) -> Any:
    """Run one pickle from ``cursor`` and return its value.

    ``persistent`` answers persistent ids (torch's storages), ``nested`` reads a torch file held as bytes.
    Raises `UnsafeCheckpointError` for a pickle that names something dangerous, `CheckpointError` for a
    damaged one.
    """
    try:
        return _Machine(cursor, report, persistent or storage_from_id, nested).run()
    except (IndexError, ValueError, TypeError, KeyError, AttributeError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"{cursor.source.name}: the pickle is damaged near byte {cursor.at:,} ({type(error).__name__}: {error})"
        ) from error


def storage_from_id(pid: Any) -> StorageRef:
    """torch's persistent id ``("storage", type, key, location, numel[, view])`` as a reference."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
        raise CheckpointError(f"a persistent id of an unknown kind: {short(pid)}; only torch storages are known")
    kind, key, location, numel = pid[1:5]
    dtype = storage_dtype(kind)
    if not isinstance(numel, int) or numel < 0:
        raise CheckpointError(f"storage {short(key)} claims {short(numel)} elements")
    offset = 0
    if len(pid) > 5 and isinstance(pid[5], tuple) and len(pid[5]) == 3:
        _, offset, numel = pid[5]
        if not isinstance(offset, int) or not isinstance(numel, int) or offset < 0 or numel < 0:
            raise CheckpointError(f"storage {short(key)} is a view with offset {short(offset)}, {short(numel)}")
    return StorageRef(_text(key), dtype, numel, _text(location), offset)


def storage_dtype(kind: Any) -> torch.dtype:
    """The element type of a storage class."""
    if isinstance(kind, Global) and kind.module.split(".")[0] == "torch" and kind.name in dtypes.STORAGES:
        return dtypes.STORAGES[kind.name]
    raise CheckpointError(f"unknown storage type {short(kind)}; known: {', '.join(dtypes.STORAGES)}")


def short(value: Any) -> str:
    """A bounded description of any value, for messages."""
    if isinstance(value, str | bytes | int | float | None):
        text = repr(value[:60] if isinstance(value, str | bytes) else value) if not _huge(value) else "a huge number"
        return text[:80]
    return str(value)[:80] if isinstance(value, Global) else f"a {type(value).__name__}"


def _huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 256


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, int) and not _huge(value):
        return str(value)
    raise CheckpointError(f"a name was expected, found {short(value)}")


def _hashable(key: Any, budget: int = 64) -> Any:
    # Hashing a tuple of shared tuples can take exponential time, so keys stay small and flat.
    if isinstance(key, tuple):
        if len(key) > budget:
            raise CheckpointError("a dictionary key is a tuple of more than 64 elements")
        return tuple(_hashable(k, budget // (len(key) + 1)) for k in key)
    if isinstance(key, str | bytes | int | float | complex | frozenset | None | Global | Record):
        return key
    if isinstance(key, TensorRef | ArrayRef | StorageRef | SparseRef | _Dtype):
        return key
    raise CheckpointError(f"a dictionary key is {short(key)}")


class _Machine:
    def __init__(
        self,
        cursor: Cursor,
        report: Report,
        persistent: Callable[[Any], Any],
        nested: Callable[[bytes], Any] | None,
    ) -> None:
        self.cursor, self.report, self.persistent, self.nested = cursor, report, persistent, nested
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = MAX_OPCODES + 2 * cursor.source.size

    def spend(self, amount: int) -> None:
        """Count copied elements or bytes: sharing one large object must not multiply memory."""
        self.budget -= amount
        if self.budget < 0:
            raise UnsafeCheckpointError(
                f"{self.cursor.source.name}: the pickle copies its own data over and over; no checkpoint needs that"
            )

    def run(self) -> Any:
        take, table = self.cursor.take, _TABLE
        for _ in range(MAX_OPCODES):
            code = take(1)
            if code == b".":
                value = self.pop()
                return value
            action = table.get(code)
            if action is None:
                raise CheckpointError(
                    f"{self.cursor.source.name}: byte {self.cursor.at - 1:,} is no pickle instruction ({code!r})"
                )
            action(self)
        raise UnsafeCheckpointError(
            f"{self.cursor.source.name}: the pickle has more than {MAX_OPCODES:,} instructions; no model does"
        )

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise CheckpointError(f"{self.cursor.source.name}: the pickle takes a value where there is none")
        return value

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise CheckpointError(f"{self.cursor.source.name}: the pickle takes a value where there is none")
        return value

    def pop_to_mark(self) -> list[Any]:
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                values = stack[index + 1 :]
                del stack[index:]
                return values
        raise CheckpointError(f"{self.cursor.source.name}: the pickle closes a list it never opened")

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.cursor.take(struct.calcsize(form)))[0]
        return value

    def find(self, module: Any, name: Any) -> Global:
        module, name = _text(module), _text(name)
        if len(module) + len(name) > 1024:
            raise UnsafeCheckpointError(f"{self.cursor.source.name}: the pickle names a class of 1024 letters or more")
        # Protocols below 3 use Python 2's names: `commands.check_output` is subprocess's, `__builtin__` builtins.
        module, name = _PYTHON_2_NAMES.get((module, name), (_PYTHON_2_MODULES.get(module, module), name))
        # Protocol 4 allows dotted names: os.path as module and name, or torch and hub.load.
        full = f"{module}.{name}"
        magic = any(part.startswith("__") and part.endswith("__") for part in name.split("."))
        if module.split(".")[0] in _DANGEROUS_MODULES or full in _DANGEROUS_NAMES or magic:
            raise UnsafeCheckpointError(
                f"{self.cursor.source.name}: the pickle asks for {full}, which could run code. No checkpoint needs it: "
                f"treat the file as hostile. Nothing was executed."
            )
        self.report.globals[full] = None
        if any(full.startswith(carrier) for carrier in _CODE_CARRIERS) or full == "builtins.getattr":
            self.report.odd[full] = None
        return Global(module, name)

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise CheckpointError(f"{self.cursor.source.name}: a call whose arguments are {short(args)}")
        if isinstance(function, Global):
            native = _NATIVE.get(str(function))
            if native is not None:
                return native(self, args)
        elif not isinstance(function, Record):
            raise CheckpointError(f"{self.cursor.source.name}: the pickle calls {short(function)}")
        return Record(function, args)

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Record):
            if isinstance(state, tuple) and len(state) == 2 and all(isinstance(s, dict | None) for s in state):
                self.spend(sum(len(s or ()) for s in state))
                state = {**(state[0] or {}), **(state[1] or {})}
            target.state = state
        elif isinstance(target, _Dtype):
            if isinstance(state, tuple) and len(state) > 1:
                target.order = _text(state[1])
        elif isinstance(target, ArrayRef):
            _, shape, dtype, fortran, data = state
            target.shape, target.dtype, target.fortran = _sizes(shape), dtype, bool(fortran)
            target.data = data if isinstance(data, bytes) else b""
        elif not isinstance(target, dict | TensorRef | list | SparseRef | StorageRef):
            raise CheckpointError(f"{self.cursor.source.name}: a state is given to {short(target)}")

    def append(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Record):
            target.items.extend(values)
        else:
            raise CheckpointError(f"{self.cursor.source.name}: elements are appended to {short(target)}")

    def set_items(self, target: Any, values: list[Any]) -> None:
        pairs = target.pairs if isinstance(target, Record) else target
        if not isinstance(pairs, dict) or len(values) % 2:
            raise CheckpointError(f"{self.cursor.source.name}: items are set in {short(target)}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            pairs[_hashable(key)] = value

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError(f"{self.cursor.source.name}: the pickle recalls object {index}, never stored")
        self.stack.append(self.memo[index])


# ---------------------------------------------------------------------------------------------------
# What is understood natively


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, tuple | list) or len(value) > MAX_NDIM:
        raise CheckpointError(f"a shape was expected, found {short(value)}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and not _huge(n) for n in value):
        raise CheckpointError("a shape holds something other than sizes")
    return tuple(value)


def _tensor(machine: _Machine, args: tuple[Any, ...], dtype: Any = None, quantizer: Any = None) -> TensorRef:
    storage, offset, shape, stride = args[:4]
    if not isinstance(storage, StorageRef):
        raise CheckpointError(f"a tensor is built on {short(storage)} instead of a storage")
    if not isinstance(offset, int) or _huge(offset):
        raise CheckpointError(f"a tensor begins at {short(offset)}")
    kind = storage.dtype
    if dtype is not None:
        found = dtypes.TORCH_NAMES.get(dtype.name) if isinstance(dtype, Global) and dtype.module == "torch" else None
        if found is None:
            raise CheckpointError(f"a tensor has the unknown element type {short(dtype)}")
        kind = found
    machine.report.locations[storage.location] = None
    return TensorRef(storage, offset, _sizes(shape), _sizes(stride), kind, quantizer)


def _tensor_v3(machine: _Machine, args: tuple[Any, ...]) -> TensorRef:
    return _tensor(machine, args, dtype=args[6])


def _qtensor(machine: _Machine, args: tuple[Any, ...]) -> TensorRef:
    if not isinstance(args[4], tuple):
        raise CheckpointError("a quantised tensor without quantiser parameters")
    return _tensor(machine, args, quantizer=args[4])


def _from_type(machine: _Machine, args: tuple[Any, ...]) -> Any:
    return machine.call(args[0], args[2])


def _sparse(machine: _Machine, args: tuple[Any, ...]) -> Any:
    layout, data = args[0], args[1]
    if str(layout) in ("torch.sparse_coo", "torch.serialization._get_layout") or "sparse_coo" in _layout(layout):
        indices, values, shape = data[:3]
        if isinstance(indices, TensorRef) and isinstance(values, TensorRef):
            return SparseRef(indices, values, _sizes(shape))
    return Record(Global("torch._utils", "_rebuild_sparse_tensor"), args)


def _layout(value: Any) -> str:
    return " ".join(str(a) for a in value.args) if isinstance(value, Record) else ""


def _data_less(machine: _Machine, args: tuple[Any, ...]) -> Record:
    machine.report.data_less += 1
    return Record(Global("torch", "meta_tensor"), ())


def _ordered(machine: _Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    if not args:
        return {}
    machine.spend(len(args[0]))
    if isinstance(args[0], dict):
        return dict(args[0])
    return {_hashable(key): value for key, value in args[0]}


def _defaultdict(machine: _Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    return _ordered(machine, args[1:])


def _first(machine: _Machine, args: tuple[Any, ...]) -> Any:
    return args[0]


def _set(machine: _Machine, args: tuple[Any, ...]) -> list[Any]:
    if not args:
        return []
    machine.spend(len(args[0]))
    return list(args[0])


def _encode(machine: _Machine, args: tuple[Any, ...]) -> bytes:
    if not isinstance(args[0], str) or args[1:] not in ((), ("latin1",), ("latin-1",), ("utf-8",), ("utf8",)):
        raise CheckpointError("a text is encoded in an unexpected way")
    machine.spend(len(args[0]))
    return args[0].encode(args[1] if len(args) > 1 else "utf-8")


def _dtype(machine: _Machine, args: tuple[Any, ...]) -> _Dtype:
    return _Dtype(_text(args[0]))


def _array(machine: _Machine, args: tuple[Any, ...]) -> ArrayRef:
    return ArrayRef()


def _array_from_buffer(machine: _Machine, args: tuple[Any, ...]) -> ArrayRef:
    data, dtype, shape, order = args
    return ArrayRef(dtype, _sizes(shape), bytes(data) if isinstance(data, bytes | bytearray) else b"", order == "F")


def _scalar(machine: _Machine, args: tuple[Any, ...]) -> Any:
    dtype = args[0].numpy() if isinstance(args[0], _Dtype) else None
    if dtype is None or not isinstance(args[1], bytes):
        return Record(Global("numpy", "scalar"), args)
    return np.frombuffer(args[1], dtype=dtype, count=1)[0].item()


def _path(machine: _Machine, args: tuple[Any, ...]) -> str:
    machine.spend(sum(len(_text(part)) for part in args))
    return "/".join(_text(part) for part in args)


def _bytes_of_torch_file(machine: _Machine, args: tuple[Any, ...]) -> Any:
    if machine.nested is None or not isinstance(args[0], bytes):
        raise CheckpointError("a storage held as bytes in a place where none is expected")
    machine.spend(len(args[0]))
    return machine.nested(args[0])


_NATIVE: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_qtensor": _qtensor,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_xla_tensor": _first,
    "torch._utils._rebuild_meta_tensor_no_storage": _data_less,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
    "torch.storage._load_from_bytes": _bytes_of_torch_file,
    "torch.Size": _first,
    "torch.device": _path,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensor_from_id": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _defaultdict,
    "collections.Counter": _ordered,
    "builtins.dict": _ordered,
    "builtins.list": _set,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy._core.numeric._frombuffer": _array_from_buffer,
    "pathlib.PosixPath": _path,
    "pathlib.WindowsPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib._local.PosixPath": _path,
}


# ---------------------------------------------------------------------------------------------------
# The instructions, https://docs.python.org/3/library/pickletools.html


def _op_proto(m: _Machine) -> None:
    version = m.cursor.take(1)[0]
    if version > 5:
        raise CheckpointError(f"{m.cursor.source.name}: pickle protocol {version} is not known (0 to 5 are)")


def _op_push(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


def _op_fresh(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(make())


def _op_number(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.number(form))


def _op_long(form: str) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        m.stack.append(int.from_bytes(m.cursor.take(m.number(form)), "little", signed=True))

    return act


def _op_text(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.cursor.take(m.number(form)).decode("utf-8", "surrogatepass"))


def _op_bytes(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.cursor.take(m.number(form)))


def _op_byte_text(form: str) -> Callable[[_Machine], None]:
    # Python 2's str: text where it is ASCII, as names are; otherwise bytes, as array contents are.
    def act(m: _Machine) -> None:
        data = m.cursor.take(m.number(form))
        m.stack.append(data.decode("ascii") if data.isascii() else data)

    return act


def _op_line_int(m: _Machine) -> None:
    line = m.cursor.line()[:64]
    m.stack.append({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line))


def _op_line_long(m: _Machine) -> None:
    m.stack.append(int(m.cursor.line().rstrip(b"L")[:400]))


def _op_line_float(m: _Machine) -> None:
    m.stack.append(float(m.cursor.line()[:400]))


def _op_line_string(m: _Machine) -> None:
    line = m.cursor.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise CheckpointError(f"{m.cursor.source.name}: a text without quotes")
    m.stack.append(line[1:-1].decode("unicode_escape", "replace"))


def _op_line_unicode(m: _Machine) -> None:
    m.stack.append(m.cursor.line().decode("raw_unicode_escape", "replace"))


def _op_line_put(m: _Machine) -> None:
    m.remember(int(m.cursor.line()[:32]))


def _op_line_get(m: _Machine) -> None:
    m.recall(int(m.cursor.line()[:32]))


def _op_tuple(size: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        values = [m.pop() for _ in range(size)]
        m.stack.append(tuple(reversed(values)))

    return act


def _op_append(m: _Machine) -> None:
    value = m.pop()
    m.append(m.top(), [value])


def _op_appends(m: _Machine) -> None:
    values = m.pop_to_mark()
    m.append(m.top(), values)


def _op_set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items(m.top(), [key, value])


def _op_set_items(m: _Machine) -> None:
    values = m.pop_to_mark()
    m.set_items(m.top(), values)


def _op_dict(m: _Machine) -> None:
    result: dict[Any, Any] = {}
    values = m.pop_to_mark()
    m.set_items(result, values)
    m.stack.append(result)


def _op_global(m: _Machine) -> None:
    module, name = m.cursor.line(), m.cursor.line()
    m.stack.append(m.find(module, name))


def _op_stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.stack.append(m.find(module, name))


def _op_reduce(m: _Machine) -> None:
    args, function = m.pop(), m.pop()
    m.stack.append(m.call(function, args))


def _op_new(m: _Machine) -> None:
    args, cls = m.pop(), m.pop()
    m.stack.append(m.call(cls, args))


def _op_new_ex(m: _Machine) -> None:
    kwargs, args, cls = m.pop(), m.pop(), m.pop()
    record = m.call(cls, args)
    if isinstance(record, Record) and isinstance(kwargs, dict):
        record.pairs.update(kwargs)
    m.stack.append(record)


def _op_inst(m: _Machine) -> None:
    function = m.find(m.cursor.line(), m.cursor.line())
    m.stack.append(m.call(function, tuple(m.pop_to_mark())))


def _op_obj(m: _Machine) -> None:
    values = m.pop_to_mark()
    m.stack.append(m.call(values[0], tuple(values[1:])))


def _op_build(m: _Machine) -> None:
    state = m.pop()
    m.build(m.top(), state)


def _op_extension(m: _Machine) -> None:
    raise UnsafeCheckpointError(
        f"{m.cursor.source.name}: the pickle asks for a class by an extension code of the program that wrote it"
    )


def _op_persistent(m: _Machine) -> None:
    m.stack.append(m.persistent(m.pop()))


def _op_line_persistent(m: _Machine) -> None:
    m.stack.append(m.persistent(_text(m.cursor.line())))


def _op_frame(m: _Machine) -> None:
    length = m.number("<Q")
    m.cursor.source.check(m.cursor.at, length, "a frame of the pickle")


def _op_pop(m: _Machine) -> None:
    m.stack.pop()


def _op_memoize(m: _Machine) -> None:
    m.remember(len(m.memo))


_TABLE: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _op_proto,
    b"\x95": _op_frame,
    b"(": _op_push(_MARK),
    b"0": _op_pop,
    b"1": lambda m: m.pop_to_mark(),
    b"2": lambda m: m.stack.append(m.top()),
    b"N": _op_push(None),
    b"\x88": _op_push(True),
    b"\x89": _op_push(False),
    b"I": _op_line_int,
    b"L": _op_line_long,
    b"F": _op_line_float,
    b"J": _op_number("<i"),
    b"K": _op_number("<B"),
    b"M": _op_number("<H"),
    b"G": _op_number(">d"),
    b"\x8a": _op_long("<B"),
    b"\x8b": _op_long("<I"),
    b"S": _op_line_string,
    b"V": _op_line_unicode,
    b"T": _op_byte_text("<I"),
    b"U": _op_byte_text("<B"),
    b"X": _op_text("<I"),
    b"\x8c": _op_text("<B"),
    b"\x8d": _op_text("<Q"),
    b"B": _op_bytes("<I"),
    b"C": _op_bytes("<B"),
    b"\x8e": _op_bytes("<Q"),
    b"\x96": _op_bytes("<Q"),
    b"]": _op_fresh(list),
    b"}": _op_fresh(dict),
    b")": _op_push(()),
    b"\x8f": _op_fresh(list),
    b"l": lambda m: m.stack.append(m.pop_to_mark()),
    b"t": lambda m: m.stack.append(tuple(m.pop_to_mark())),
    b"\x85": _op_tuple(1),
    b"\x86": _op_tuple(2),
    b"\x87": _op_tuple(3),
    b"d": _op_dict,
    b"\x91": lambda m: m.stack.append(m.pop_to_mark()),
    b"\x90": _op_appends,
    b"a": _op_append,
    b"e": _op_appends,
    b"s": _op_set_item,
    b"u": _op_set_items,
    b"p": _op_line_put,
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": _op_memoize,
    b"g": _op_line_get,
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    b"c": _op_global,
    b"\x93": _op_stack_global,
    b"R": _op_reduce,
    b"\x81": _op_new,
    b"\x92": _op_new_ex,
    b"i": _op_inst,
    b"o": _op_obj,
    b"b": _op_build,
    b"P": _op_line_persistent,
    b"Q": _op_persistent,
    b"\x82": _op_extension,
    b"\x83": _op_extension,
    b"\x84": _op_extension,
}
