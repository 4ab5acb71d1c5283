"""The zoo as its users see it: ``Zoo(folder)`` with ``index``, ``table``, ``similar`` and ``failures``."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from weightspace.errors import ZooError
from weightspace.paths import cache_dir
from weightspace.zoo.examine import Examined, examine, models_in, stamp_of
from weightspace.zoo.store import FileStamp, ModelRow, Store

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from weightspace.checkpoint import Checkpoint
    from weightspace.lineage import Lineage
    from weightspace.mergeability.measurements import Measurement
    from weightspace.wiring.wiring import Wiring
    from weightspace.zoo.search import Search

INDEX_FOLDER = ".weightspace"
Measure = Literal["all", "function, descriptor", "function", "both", "encoder", "descriptor"]
By = Literal["auto", "all", "function", "both", "encoder", "descriptor"]
_IN_TURN: tuple[Measure, ...] = ("all", "function, descriptor", "both", "descriptor")


@dataclass(frozen=True)
class Neighbour:
    """A model of the zoo and its distance from the one asked about; 0 is the same up to symmetry.

    ``measure`` says whose distance it is: that of the pretrained "encoder" (1 is usual between networks trained
    independently), that of the training-free "descriptor", the geometric mean of "both", that of the "function" (what
    networks compute of the same made-up inputs; with nothing in common they are √2 apart), or the geometric mean of
    "function, descriptor" or of "all" three. They have different scales and do not compare.
    """

    name: str
    distance: float
    path: Path
    card: Mapping[str, Any]
    measure: Measure = "descriptor"

    @property
    def why(self) -> str:
        """What the distance says, in words."""
        if self.distance < 1e-6:
            return {
                "function": "the same function: it answers all inputs alike",
                "all": "the same function, or the same up to symmetry",
                "function, descriptor": "the same function, or the same up to symmetry",
                "both": "the same up to symmetry, as encoder or descriptor sees it",
            }.get(self.measure, f"the same up to symmetry, as the {self.measure} sees it")
        scale = {
            "encoder": "by the encoder; 1 is usual between networks trained independently",
            "descriptor": "by statistics of the weights that no symmetry changes; 0 is the same",
            "both": "by the mean of encoder and descriptor; 0 is the same",
            "function": "by what they answer to the same inputs; 0 is the same function, 1.4 is nothing in common",
            "function, descriptor": "by what they answer and the descriptor; 0 is the same",
            "all": "by what they answer, encoder and descriptor together; 0 is the same",
        }[self.measure]
        return f"{self.distance:.3g} away {scale}"


@dataclass(frozen=True)
class IndexReport:
    """What one run of ``Zoo.index`` did.

    ``models`` counts what the index holds now and ``inside`` those in the range of the pretrained encoder,
    ``failures`` and ``ignored`` give each file with the reason, ``index`` is the folder of the index; the other
    numbers count files.
    """

    models: int
    described: int
    unchanged: int
    removed: int
    ignored: tuple[tuple[str, str], ...]
    failures: tuple[tuple[str, str], ...]
    index: Path
    seconds: float
    inside: int = 0


class Zoo:
    """A folder of models and its index.

    ::

        zoo = ws.Zoo("models/")
        zoo.index()                         # opens, wires and describes every model in the folder
        zoo.table()                         # a pandas frame, one row per model
        zoo.similar("model.safetensors")    # the nearest models, with distances

    The index lies in ``<folder>/.weightspace``, or in the platform's cache (``WEIGHTSPACE_CACHE`` moves it)
    when the folder cannot be written to; ``index=`` puts it elsewhere. ``zoo.index_folder`` says where.
    Raises ``ZooError`` when the folder does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str], index: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise ZooError(f"{self.folder} is not a folder; a zoo is a folder of model files")
        self.index_folder = (
            _index_folder(self.folder) if index is None else Path(index).expanduser().resolve()
        )

    def __repr__(self) -> str:
        return f"Zoo({str(self.folder)!r}, index={str(self.index_folder)!r})"

    def index(self, jobs: int | None = None, progress: bool = True, force: bool = False) -> IndexReport:
        """Bring the index up to date with the folder.

        Every file is recognised by its content. Files with the size and time, or else the hash, that the
        index knows are skipped; those that are gone are dropped. Each file is committed on its own: after a
        kill the next run goes on where this one stopped. ``jobs`` is the number of worker processes
        (default: one per core, fewer when there is little to do); ``force`` describes everything anew.
        Beside its training-free descriptor every model in the range of the pretrained encoder gets its vector, and
        every one that can be run that of its function. An index without these, or of another encoder, is brought
        up to date file by file, and serves until then.
        """
        from time import perf_counter

        from filelock import FileLock, Timeout

        from weightspace.pretrained import shipped

        # Damaged files of the package are one error here, and not one for every model.
        shipped()

        started = perf_counter()
        if self.index_folder == self.folder / INDEX_FOLDER and not _writable(self.folder):
            self.index_folder = _cached_folder(self.folder)
        self.index_folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.index_folder / "lock", timeout=0)
        try:
            with lock, self._store(write=True) as store:
                return self._update(store, jobs, progress, force, started)
        except Timeout as error:
            raise ZooError(
                f"another process is indexing {self.folder} (it holds {lock.lock_file}); wait for it to end"
            ) from error

    def table(self) -> pd.DataFrame:
        """One row per model: what its card says, and its training record where it has one.

        ``inside`` is whether the pretrained encoder's range holds it, and ``predicted_accuracy`` with its 90 %
        interval what the pretrained predictor says of an image classifier in its own range; not numbers elsewhere.
        """
        import pandas as pd

        with self._store(write=False) as store:
            models = store.models()
        rows = []
        for model in models:
            card = model.card
            record = {key: value for key, value in card["record"].items() if not isinstance(value, dict)}
            columns = {
                "name": model.name,
                "format": card["format"],
                "architecture": card["architecture"],
                "parameters": card["parameters"],
                "tensors": card["tensors"],
                "bytes": card["bytes"],
                "recognised": card["recognised"],
                "wiring": card["wiring"],
                "error": card["error"],
                "movable": card["movable"],
                "findings": len(card["findings"]),
                "inside": bool(model.reading.get("inside")),
                "predicted_accuracy": _number(model.reading.get("accuracy")),
                "predicted_low": _number(model.reading.get("accuracy_low")),
                "predicted_high": _number(model.reading.get("accuracy_high")),
                "sha256": model.sha256,
            }
            rows.append({**{key: value for key, value in record.items() if key not in columns}, **columns})
        frame = pd.DataFrame(rows)
        return frame.set_index("name") if rows else frame

    def embeddings(self) -> tuple[list[str], np.ndarray[Any, np.dtype[np.float32]]]:
        """Names of all models and their training-free descriptors, (models, features), float32."""
        with self._store(write=False) as store:
            return store.embeddings()

    def similar(
        self,
        x: str | os.PathLike[str] | Checkpoint | Mapping[str, Tensor],
        k: int = 10,
        by: By = "auto",
    ) -> list[Neighbour]:
        """The ``k`` models of the zoo nearest to ``x``, nearest first.

        ``x`` is a file (also ``file!member``), a checkpoint, named tensors, or the name of a model in the
        zoo. A model of the zoo is not its own neighbour; a copy of it is, at distance 0.

        ``by`` is the measure: that of the pretrained ``"encoder"``, which holds for models inside its range alone;
        that of the ``"function"``, which compares models that were asked the same inputs (``retrieval.function``); or
        the training-free ``"descriptor"``, which holds for any. ``"both"`` is the geometric mean of encoder and
        descriptor, ``"all"`` that of the three (``retrieval.blend``), for models that have them. ``"auto"`` takes as
        many as it can: first come models by all three, then those that answer the same inputs, by function and
        descriptor, then those in the encoder's range, by both, and the others by the descriptor. Every neighbour says
        what its ``measure`` is, and within one measure they are in order; no distance of one is ever ranked against
        another's.

        Raises ``ZooError`` when the zoo has no index yet or holds no model, and for any ``by`` but ``"auto"`` and
        ``"descriptor"`` when the model asked about cannot be compared so, with the reason, or no model of the zoo can.
        """
        from weightspace.retrieval import blended, distances, with_function

        if by not in get_args(By):
            raise ZooError(f"similar: by is {by!r}; expected one of {', '.join(map(repr, get_args(By)))}")
        with self._store(write=False, encoder=by != "descriptor") as store:
            names, vectors = store.embeddings()
            if not names:
                raise ZooError(
                    f"the index of {self.folder} holds no model; run `weightspace index` on it first"
                )
            own, query = self._query(store, x, read=by != "descriptor")
            others = [i for i, name in enumerate(names) if name != own]
            plain = distances(np.asarray(query.embedding, dtype=np.float64), np.asarray(vectors, dtype=np.float64))
            nowhere = np.full(len(names), np.nan)
            away = computed = nowhere
            if by not in ("descriptor", "function") and self._comparable(store, query, by, "learned"):
                learned, inside = store.learned()
                away = np.linalg.norm(learned.astype(np.float64) - np.asarray(query.learned, dtype=np.float64), axis=1)
                away = np.where(inside, away, np.nan)
            if by in ("auto", "all", "function") and self._comparable(store, query, by, "function"):
                functions, asked = store.functions()
                computed = np.linalg.norm(
                    functions.astype(np.float64) - np.asarray(query.function, dtype=np.float64), axis=1
                )
                same = np.array([what == query.reading.get("asked") for what in asked], dtype=bool)
                computed = np.where(same, computed, np.nan)
            both = blended(away, plain)
            measures: dict[Measure, NDArray[np.float64]] = {
                "all": with_function(computed, both), "function, descriptor": with_function(computed, plain),
                "function": computed, "both": both, "encoder": away, "descriptor": plain,
            }  # fmt: skip
            ranked: list[tuple[int, float, Measure]] = []
            for measure in _IN_TURN if by == "auto" else (by,):
                far = measures[measure]
                some = [i for i in others if np.isfinite(far[i])]
                others = [i for i in others if not np.isfinite(far[i])]
                # Copies are at 0 by every product: the single measures order what a product holds equal.
                some.sort(key=lambda i: (far[i], *np.nan_to_num([computed[i], away[i]]), plain[i]))
                ranked += [(i, float(far[i]), measure) for i in some]
            if not ranked:
                raise ZooError(
                    f"no other model of {self.folder} can be compared by {by!r}; ask with by='descriptor', or run "
                    "`weightspace index` if the index is an older one"
                )
            neighbours = []
            for position, distance, whose in ranked[:k]:
                model = store.model(names[position])
                assert model is not None
                neighbours.append(
                    Neighbour(model.name, distance, self.folder / model.path, model.card, whose)
                )
        return neighbours

    def search_task(self, x: Tensor, y: object, k: int = 10, *, progress: bool = False) -> Search:
        """The ``k`` models that know most of the task that a few labelled rows are of, by running all that can.

        ``x (n, ...)``: inputs as a model takes them, numbers or tokens, scaled as in its training. ``y (n,)``: classes
        (whole numbers or texts, under any names and in any order) or floating numbers. Each hit says what its outputs
        tell of the labels; ``left_out`` says of every other model why it could not be asked: another shape of inputs,
        no network known for its weights, a wiring that is not proved. See ``weightspace.retrieval.task``.

        Raises ``ZooError`` when the zoo has no index yet, ``WeightspaceError`` for rows or labels of no use.
        """
        from weightspace.zoo.search import by_task

        return by_task(self.folder, self._all(), x, y, k, progress)

    def search_architecture(
        self, x: str | os.PathLike[str] | Checkpoint | Wiring | nn.Module, *inputs: Any, k: int = 10,
        progress: bool = False,
    ) -> Search:  # fmt: skip
        """The ``k`` models whose computation is most like that of ``x``, by the graphs of their wirings.

        ``x``: a file or the name of a model in the zoo, a checkpoint, a wiring, or a module with example ``inputs``.
        A score of 1 is the same graph, whatever the widths; see ``weightspace.retrieval.architecture``. A model of the
        zoo is not its own neighbour. Models that cannot be wired are left out, with the reason.

        Raises ``ZooError`` when the zoo has no index yet, and ``WiringError`` where ``x`` cannot be wired.
        """
        from weightspace import checkpoint
        from weightspace.retrieval.architecture import fingerprint
        from weightspace.wiring import wiring
        from weightspace.wiring.wiring import Wiring as Wired
        from weightspace.zoo.search import by_architecture, opened

        rows = self._all()
        own, title = "", type(x).__name__
        if isinstance(x, str | os.PathLike):
            title = os.fspath(x)
            known = {row.name: row for row in rows}
            own = title if title in known else ""
            x = opened(self.folder, known[own]) if own else checkpoint.open(x)
        asked = x if isinstance(x, Wired) else wiring(x, *inputs, prove=False)
        size = sum(math.prod(shape) for shape in asked.shapes.values())
        others = [row for row in rows if row.name != own]
        return by_architecture(
            self.folder, others, fingerprint(asked), size, title, k, self.index_folder, progress
        )

    def search(self, *conditions: str) -> Search:
        """Models whose row of ``table()`` meets every condition: ``"test_accuracy > 0.9"``, ``"architecture ~ mlp"``.

        Signs: ``<  <=  >  >=  =  !=``, and ``~`` for texts that contain the value. Raises ``ZooError`` for a condition
        that is none, and for columns that the table does not have.
        """
        from weightspace.zoo.search import by_filters

        return by_filters(self.table(), self.folder, {row.name: row for row in self._all()}, conditions)

    def lineage(
        self, models: Sequence[str] | None = None, *, moved: int = 8, seed: int = 0, progress: bool = False
    ) -> Lineage:
        """Which models of the zoo descend from which, told from their weights alone; see ``weightspace.lineage.trace``.

        ``models``: names of some of them (default: all). Edges have a direction, a confidence and a reason; merges show
        their parents' proportions; what files say of their descent is held against it. ``moved``: how many pairs of
        families of one architecture are examined for copies moved inside their orbit, seconds each (deep ones a
        minute). Files that could not be read are among those left out, with the reason.

        Raises ``ZooError`` when the zoo has no index yet, for names that are not in it, and for fewer than two models.
        """
        from weightspace.lineage import trace
        from weightspace.zoo.search import opened

        rows = {row.name: row for row in self._all()}
        unknown = [name for name in models or () if name not in rows]
        if unknown:
            raise ZooError(f"there is no model {unknown[0]} in the index of {self.folder}")
        chosen = list(rows) if models is None else list(dict.fromkeys(models))
        if len(chosen) < 2:
            raise ZooError(f"{len(chosen)} models of {self.folder} to compare; a lineage needs at least two")
        found = trace(
            {n: opened(self.folder, rows[n]) for n in chosen},
            records={n: rows[n].card["record"] for n in chosen},
            descriptors={n: np.asarray(rows[n].embedding, dtype=np.float64) for n in chosen},
            moved=moved, seed=seed, progress=progress,
        )  # fmt: skip
        return found if models is not None else replace(found, left_out={**found.left_out, **dict(self.failures())})

    def failures(self) -> list[tuple[str, str]]:
        """Files that look like checkpoints but could not be read, each with the reason."""
        with self._store(write=False) as store:
            return store.outcomes("failed")

    def ignored(self) -> list[tuple[str, str]]:
        """Files that are no checkpoints, each with the reason."""
        with self._store(write=False) as store:
            return store.outcomes("ignored")

    def record_merge(
        self,
        models: Sequence[str | os.PathLike[str]],
        method: str,
        outcome: float | None = None,
        *,
        retained: Sequence[float] = (),
        merged: Sequence[float] = (),
        alone: Sequence[float] = (),
        **facts: Any,
    ) -> Measurement:
        """Keep what a merge of this zoo's models was found to retain, for ``ws.score`` to learn from.

        ``models``: two or more files of the zoo, or their names in it. What was found is given in one of three ways:
        ``outcome``, merged over single accuracy averaged over the models' tasks (0.93); ``retained``, the same for each
        model's own tasks; or ``merged`` and ``alone``, accuracies of the merged network and of each model by itself on
        that model's tasks. For the method ``"barrier"`` the outcome is the accuracy lost half way between two models.
        ``facts``: what else is worth keeping (the base, hyper-parameters, data), as values that JSON has.

        Added to ``merges.jsonl`` in the index's folder; a merge that is measured again counts with its last outcome.
        Raises ``WeightspaceError`` for models that are not in the zoo and outcomes that make no sense.
        """
        from datetime import UTC, datetime

        from weightspace.errors import WeightspaceError
        from weightspace.mergeability.measurements import as_measurement
        from weightspace.zoo import merges

        names = [self._name_of(model) for model in models]
        if merged or alone:
            if retained or not len(merged) == len(alone) == len(names) or min(alone) <= 0:
                raise WeightspaceError(
                    f"found {len(merged)} accuracies of the merged model and {len(alone)} of models alone; expected "
                    f"one above 0 of each for every one of the {len(names)} models"
                )
            retained = [m / a for m, a in zip(merged, alone, strict=True)]
        row = {"models": names, "method": method, "outcome": outcome, "retained": list(retained)}
        found = as_measurement(row, "the merge to record")
        files = {name: merges.stamp(self._file_of(name)) for name in names}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        given = {"merged": list(merged), "alone": list(alone)} if merged else {}
        try:
            merges.append(
                self.index_folder / merges.FILE,
                {**facts, **row, "outcome": found.outcome, "files": files, "when": when, **given},
            )
        except TypeError as error:
            raise WeightspaceError(f"facts about a merge have to be values that JSON has ({error})") from None
        return found

    def merges(self) -> tuple[Measurement, ...]:
        """The measured merges that were recorded, each with its last outcome; see ``record_merge``.

        Those whose models' files are no longer what they were do not count.
        """
        from weightspace.mergeability.measurements import as_measurement, latest
        from weightspace.zoo import merges

        path = self.index_folder / merges.FILE
        same: dict[tuple[str, str], bool] = {}
        kept = []
        for number, row in enumerate(merges.read(path), 1):
            files = row.get("files") or {}
            for name, known in files.items():
                if (name, str(known)) not in same:
                    same[name, str(known)] = merges.unchanged(self._file_of(name), known)
            if all(same[name, str(known)] for name, known in files.items()):
                kept.append(as_measurement(row, f"{path}, line {number}"))
        return latest(kept)

    def _all(self) -> list[ModelRow]:
        with self._store(write=False) as store:
            return store.models()

    def _name_of(self, model: str | os.PathLike[str]) -> str:
        """The name in this zoo of a file, or of what is named already."""
        text = os.fspath(model)
        path, _, member = (text, "", "") if (self.folder / text).exists() or "!" not in text else text.partition("!")
        for place in (self.folder / path, Path(path)):
            resolved = place.resolve()
            if resolved.exists() and resolved != self.folder and resolved.is_relative_to(self.folder):
                return resolved.relative_to(self.folder).as_posix() + (f"!{member}" if member else "")
        raise ZooError(f"there is no model {text} in {self.folder}; name files of this folder")

    def _file_of(self, name: str) -> Path:
        path = self.folder / name
        return path if path.exists() or "!" not in name else self.folder / name.partition("!")[0]

    @contextmanager
    def _store(self, write: bool, encoder: bool = False) -> Iterator[Store]:
        """The index; with ``encoder`` its vectors beside the descriptors are those of this version or none."""
        from weightspace.retrieval.descriptor import DIMENSION, VERSION

        others = None
        if write or encoder:
            from weightspace.pretrained import shipped
            from weightspace.retrieval import function

            others = {
                "learned": (shipped().dimension, shipped().name),
                "function": (function.LENGTH, f"function-{function.VERSION}"),
            }
        store = Store(self.index_folder, DIMENSION, f"descriptor-{VERSION}", write, others)
        try:
            yield store
        finally:
            store.close()

    def _comparable(self, store: Store, query: ModelRow, by: str, kind: Literal["learned", "function"]) -> bool:
        """Whether one of the other vectors can be asked; raises where it was asked for by name and cannot."""
        said = query.reading
        there = getattr(query, kind) is not None and (kind == "function" or bool(said.get("inside")))
        if there and store.has_learned:
            return True
        if by != "auto":
            stale = "the index was not brought up to date"
            if not store.has_learned:
                reason = "the index was made without this encoder; run `weightspace index` on its folder again"
            elif kind == "function":
                reason = f"{query.name} cannot be asked what it computes: {said.get('unasked') or stale}"
            else:
                reason = f"{query.name} is outside the range of the pretrained encoder: {said.get('reason') or stale}"
            raise ZooError(f"{reason} (by='descriptor' works for any model)")
        return False

    def _query(
        self, store: Store, x: str | os.PathLike[str] | Checkpoint | Mapping[str, Tensor], read: bool
    ) -> tuple[str | None, ModelRow]:
        """Name in the zoo (None for a model from elsewhere) and the entry of what is asked about."""
        from weightspace import checkpoint
        from weightspace.zoo.examine import describe_model

        if isinstance(x, Mapping):
            opened = x if isinstance(x, checkpoint.Checkpoint) else checkpoint.from_tensors(x)
            return None, describe_model(opened, "query", "", "", read)[0]
        known = store.model(str(x))
        if known is not None and not Path(x).exists():
            return known.name, known
        text = str(x)
        path = Path(text)
        member = None
        if not path.exists() and "!" in text:
            head, _, member = text.partition("!")
            path = Path(head)
        if not path.exists():
            raise ZooError(f"{text} is neither a file nor the name of a model in {self.folder}")
        resolved = path.resolve()
        if resolved.is_relative_to(self.folder):
            name = resolved.relative_to(self.folder).as_posix() + (f"!{member}" if member else "")
            stamp = store.stamps().get(resolved.relative_to(self.folder).as_posix())
            fresh = stamp is not None and (stamp.size, stamp.mtime_ns) == stamp_of(resolved)
            indexed = store.model(name)
            if indexed is not None and fresh:
                return name, indexed
        else:
            name = path.name + (f"!{member}" if member else "")
        for opened, model in models_in(path, name.partition("!")[0] if member else name):
            if member is None and model != name:
                raise ZooError(f"{text} holds several models; ask about one of them, such as {model!r}")
            if model == name:
                inside = name if resolved.is_relative_to(self.folder) else None
                return inside, describe_model(opened, model, "", "", read)[0]
        raise ZooError(f"{path} has no model named {member!r}")

    def _update(
        self, store: Store, jobs: int | None, progress: bool, force: bool, started: float
    ) -> IndexReport:
        from time import perf_counter

        from weightspace.progress import bar

        known = store.stamps()
        present = dict(_candidates(self.folder, self.index_folder))
        store.drop(gone := [name for name in known if name not in present])
        todo: list[tuple[Path, str, str | None]] = []
        for name, path in present.items():
            stamp = known.get(name)
            if not force and stamp is not None and (stamp.size, stamp.mtime_ns) == _stamp_or_none(path):
                continue
            todo.append((path, name, stamp.sha256 if stamp is not None and not force else None))
        described = 0
        with bar(f"indexing {self.folder.name}", len(todo), progress) as advance:
            for result in _examine_all(todo, jobs):
                if result.outcome == "unchanged":
                    store.touch(result.path, result.stamp)
                else:
                    store.put(result.path, result.stamp, result.outcome, result.reason, result.models)
                    described += result.outcome == "models"
                advance(result.path)
        return IndexReport(
            models=store.count(),
            described=described,
            unchanged=len(present) - len(todo),
            removed=len(gone),
            ignored=tuple(store.outcomes("ignored")),
            failures=tuple(store.outcomes("failed")),
            index=self.index_folder,
            seconds=perf_counter() - started,
            inside=int(store.learned()[1].sum()),
        )


def _examine_all(todo: Sequence[tuple[Path, str, str | None]], jobs: int | None) -> Iterator[Examined]:
    """Examine files in worker processes, results as they come. A worker that dies costs only its own file."""
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    # A worker costs a second or two to import torch: not worth it for a handful of files.
    wanted = jobs if jobs is not None else min(os.cpu_count() or 1, 1 + len(todo) // 8)
    if wanted == 1 or len(todo) <= 1:
        for item in todo:
            yield examine(*item)
        return
    left = {item[1]: item for item in todo}
    try:
        parallel = Parallel(n_jobs=wanted, return_as="generator_unordered", pre_dispatch="2*n_jobs")
        for result in parallel(delayed(examine)(*item) for item in todo):
            left.pop(result.path)
            yield result
        return
    except TerminatedWorkerError:
        pass  # out of memory or a crash in native code: find out which file, one at a time
    for name, item in left.items():
        try:
            yield from Parallel(n_jobs=2, return_as="list")([delayed(examine)(*item)])
        except TerminatedWorkerError:
            size, mtime_ns = _stamp_or_none(item[0]) or (0, 0)
            reason = "the process reading it died (out of memory, or a crash in native code)"
            yield Examined(name, FileStamp(size, mtime_ns, ""), "failed", reason)


def _candidates(folder: Path, index: Path) -> Iterator[tuple[str, Path]]:
    """Every file below the folder that may hold a model, with its name in the zoo.

    Hidden files and folders are passed over, and links that lead out of the zoo are not followed. A Hugging
    Face folder (a config beside weights, perhaps in shards) is one candidate.
    """
    for current, folders, files in os.walk(folder):
        here = Path(current)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not (here / name).is_symlink() and here / name != index
        )
        covered: set[str] = set()
        if here != folder and _is_model_folder(files):
            covered = {name for name in files if _in_model_folder(name)}
            yield here.relative_to(folder).as_posix(), here
        for name in sorted(files):
            path = here / name
            if name.startswith(".") or name in covered or name.endswith(".tmp"):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(folder):
                continue
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _is_model_folder(files: Sequence[str]) -> bool:
    config = "config.json" in files or "adapter_config.json" in files
    return any(name.endswith(".index.json") for name in files) or (config and any(map(_is_weights, files)))


def _is_weights(name: str) -> bool:
    stem = name.startswith(("model", "pytorch_model", "adapter_model"))
    return stem and name.endswith((".safetensors", ".bin"))


def _in_model_folder(name: str) -> bool:
    return _is_weights(name) or name.endswith((".json", ".txt", ".md", ".model", ".jinja"))


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _stamp_or_none(path: Path) -> tuple[int, int] | None:
    try:
        return stamp_of(path)
    except OSError:
        return None


def _index_folder(folder: Path) -> Path:
    """Where the index of a folder lies: inside it, or in the cache when it cannot be written to."""
    inside, cached = folder / INDEX_FOLDER, _cached_folder(folder)
    if _writable(folder):
        return inside
    # An index that came along with a read-only zoo can be asked; brought up to date it is in the cache.
    came_along = (inside / "index.sqlite").is_file() and not (cached / "index.sqlite").is_file()
    return inside if came_along else cached


def _cached_folder(folder: Path) -> Path:
    return cache_dir() / "zoos" / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def _writable(folder: Path) -> bool:
    import stat
    import tempfile

    # Permission bits say what is wanted, also where root could write all the same; a read-only mount shows
    # only when it is tried.
    try:
        if not folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
