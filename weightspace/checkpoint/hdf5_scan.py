"""Says where an HDF5 file keeps what. Run as a process of its own: this file imports nothing of weightspace.

The HDF5 library is C code that a crafted file can send into an endless loop or worse, so it only ever
runs here, with limits on processor time and memory. The process reads paths, one JSON object a line, and
answers each with a JSON object: attributes, and for every data set its type, shape and place in the file.
The bytes themselves are read by the caller, without the library.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from typing import Any

MAX_DEPTH = 40
MAX_OBJECTS = 200_000
MAX_INLINE = 1 << 20
MEMORY = 4 << 30
LISTS = ("layer_names", "weight_names")
TEXTS = ("keras_version", "backend", "model_config", "training_config", "name")


class Refusal(Exception):
    """What is wrong with a file, and of which kind: "unsafe" or "damaged"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def scan(path: str) -> dict[str, Any]:
    """Attributes of the groups and places of the data sets of one file."""
    import h5py

    groups: dict[str, dict[str, Any]] = {}
    arrays: dict[str, dict[str, Any]] = {}
    with h5py.File(path, "r") as file:
        pending = [(file, "", 0)]
        while pending:
            place, name, depth = pending.pop()
            if depth > MAX_DEPTH or len(groups) + len(arrays) > MAX_OBJECTS:
                raise Refusal("unsafe", f"groups are nested deeper than {MAX_DEPTH} levels, or in a circle")
            if isinstance(place, h5py.Group):
                groups[name] = _attributes(place)
                children = []
                for key in place:
                    link = place.get(key, getlink=True)
                    full = f"{name}/{key}" if name else key
                    if isinstance(link, h5py.ExternalLink):
                        raise Refusal("unsafe", f"{full!r} is a link into the file {link.filename!r}; not followed")
                    if isinstance(link, h5py.SoftLink):
                        raise Refusal("unsafe", f"{full!r} is a soft link; weights are stored in place")
                    children.append((place[key], full, depth + 1))
                pending += reversed(children)
            elif isinstance(place, h5py.Dataset):
                arrays[name] = _array(place, name)
    return {"groups": groups, "arrays": arrays}


def _attributes(group: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in group.attrs:
        if key in TEXTS:
            found[key] = _text(group.attrs[key])
        elif key.rstrip("0123456789") in LISTS:
            # Keras splits a list over 64 KiB into attributes name0, name1, ...
            base = key.rstrip("0123456789")
            number = int(key[len(base) :] or 0)
            found.setdefault(base, {})[number] = [_text(value) for value in group.attrs[key]]
    for base in LISTS:
        if base in found:
            found[base] = [value for number in sorted(found[base]) for value in found[base][number]]
    return found


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _array(data: Any, name: str) -> dict[str, Any]:
    import h5py

    if data.external or data.is_virtual:
        raise Refusal("unsafe", f"{name} keeps its data in another file; only data in this file is read")
    if data.shape is None or data.dtype.kind not in "biufc":
        return {"dtype": str(data.dtype)[:80], "shape": None}
    about: dict[str, Any] = {"dtype": data.dtype.str, "shape": list(data.shape), "stored": data.id.get_storage_size()}
    plain = data.id.get_type().equal(h5py.h5t.py_create(data.dtype))
    offset = data.id.get_offset()
    if data.chunks is not None and plain:
        properties = data.id.get_create_plist()
        about["filters"] = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        about["chunk"] = list(data.chunks)
        count = data.id.get_num_chunks()
        if count > MAX_OBJECTS:
            raise Refusal("unsafe", f"{name} is cut into {count:,} chunks")
        infos = [data.id.get_chunk_info(i) for i in range(count)]
        about["chunks"] = [[list(c.chunk_offset), c.filter_mask, c.byte_offset, c.size] for c in infos]
        about["fill"] = float(data.fillvalue) if data.dtype.kind in "biuf" else 0.0
    elif offset is not None and plain:
        about["offset"] = offset
    elif data.nbytes <= MAX_INLINE:
        about["inline"] = base64.b64encode(data[()].tobytes()).decode()
    else:
        raise Refusal("damaged", f"{name} has no plain numbers in it; save it as a standard type")
    return about


def main() -> None:
    """Answer requests until the input ends."""
    import signal

    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import h5py

    h5py._errors.silence_errors()
    timed = hasattr(signal, "setitimer")
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if timed:
            # Not caught anywhere: the kernel ends the process when its processor time is used up.
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            answer = scan(request["path"])
        except Refusal as error:
            answer = {"error": str(error)[:500], "kind": error.kind}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500], "kind": "damaged"}
        text = json.dumps(answer)
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
