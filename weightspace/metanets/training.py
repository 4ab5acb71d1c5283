"""Training a metanet on samples: a plan in, a trained metanet out, both kept in one folder.

::

    plan = TrainingPlan(task="regression", target="test_accuracy", epochs=30)
    trained = fit(plan, train, validation, out="runs/accuracy")
    trained.predict(test)                        # (networks,), accuracies
    Trained.load("runs/accuracy")
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from weightspace.errors import MetanetError, MissingExtraError
from weightspace.graph import ParameterGraph
from weightspace.metanets.augment import Augmentation, checked
from weightspace.metanets.base import Metanet, build_metanet
from weightspace.metanets.data import Sample
from weightspace.metanets.tasks import Kind, Loss, Task, make_task
from weightspace.paths import write_whole

FORMAT, VERSION = "weightspace-metanet", 1
CONFIG, WEIGHTS = "config.json", "metanet.safetensors"
_UNFINISHED, _CHECKPOINT = "unfinished.json", "unfinished.ckpt"
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides how a training comes out, besides its samples.

    - ``task``, ``target``: kind of task and field of the record (see ``weightspace.metanets.tasks``); ``bounded``,
      ``loss``, ``embedding`` (outputs of a contrastive task) and ``temperature`` are its options.
    - ``metanet``: configuration for ``build_metanet``; its number of outputs follows from the task.
    - ``batch`` networks a step, ``epochs``; networks are dealt into batches anew every ``deal_every`` epochs, and
      in between the batches are used as they are, in another order, which saves collating them.
    - AdamW with ``learning_rate`` (its peak) and ``weight_decay`` (of matrices alone), linear warm-up over the
      share ``warmup`` of all steps, cosine decay to 0, gradients clipped to the norm ``clip`` (0: not at all).
    - ``begun``: share of the learning rate for what a metanet trained beforehand (``Metanet.begin``), 1 or less.
    - ``average``: decay of a running average of the weights, which then is what is validated and kept (0: none).
    - ``patience``: epochs without a better validation loss before the training ends (0: it never does).
    - ``precision`` ("32-true", "bf16-mixed", "16-mixed") and ``device`` ("auto", "cpu", "cuda", "mps").
    """

    task: Kind = "regression"
    target: str = "test_accuracy"
    metanet: Mapping[str, Any] = field(default_factory=lambda: {"kind": "operator"})
    batch: int = 64
    epochs: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.05
    clip: float = 1.0
    begun: float = 1.0
    average: float = 0.0
    patience: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    deal_every: int = 1
    seed: int = 0
    precision: Precision = "32-true"
    device: Device = "auto"
    bounded: bool | None = None
    loss: Loss = "bce"
    embedding: int = 64
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "deal_every", "embedding"):
            if getattr(self, name) < 1:
                raise MetanetError(f"training plan: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise MetanetError(f"training plan: {name} is {getattr(self, name)}, expected above 0")
        if not 0 <= self.begun <= 1:
            raise MetanetError(f"training plan: begun is {self.begun}, expected from 0 to 1")
        if not 0 <= self.average < 1:
            raise MetanetError(f"training plan: average is {self.average}, expected from 0 to below 1")
        for name, known in (("precision", get_args(Precision)), ("device", get_args(Device))):
            if getattr(self, name) not in known:
                raise MetanetError(f"training plan: {name} is {getattr(self, name)!r}, known: {', '.join(known)}")
        if self.task == "contrastive" and self.augmentation.mixup:
            raise MetanetError("training plan: mixup mixes targets, and a contrastive task has none; leave it out")
        if self.task == "contrastive" and not self.augmentation.changes:
            raise MetanetError("training plan: a contrastive task needs an augmentation to make two views that differ")

    def make_task(self, train: Sequence[Sample]) -> Task:
        """The task, with what it learns from the training set."""
        return make_task(
            self.task, self.target, train, bounded=self.bounded, loss_of=self.loss, outputs=self.embedding,
            temperature=self.temperature,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**found, "metanet": dict(self.metanet), "augmentation": self.augmentation.to_dict()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> TrainingPlan:
        """What ``to_dict`` gave. Raises ``MetanetError`` for an entry that does not exist or is of another type."""
        options = checked(cls, found, "training plan")
        return cls(**{**options, "augmentation": Augmentation.from_dict(found.get("augmentation", {}))})


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained metanet with its task, its plan and a row of figures per epoch.

    ``made_of`` tells plan and samples of one training from those of another.
    """

    metanet: Metanet
    task: Task
    plan: TrainingPlan
    history: tuple[dict[str, float], ...]
    made_of: str = ""

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.metanet.parameters())
        return (
            f"Trained({self.metanet.config['kind']}, {count:,} parameters, {self.task.kind} of "
            f"{self.task.target or 'views'}, {len(self.history)} epochs)"
        )

    def outputs(self, samples: Sequence[Sample | ParameterGraph], batch: int | None = None) -> Tensor:
        """Raw outputs ``(networks, outputs)`` on the CPU, without gradients, ``batch`` networks at a time."""
        graphs = [s.graph if isinstance(s, Sample) else s for s in samples]
        size = batch or self.plan.batch
        parts = [self.metanet.read(*graphs[start : start + size]).cpu() for start in range(0, len(graphs), size)]
        return torch.cat(parts) if parts else torch.empty(0, self.task.outputs)

    def predict(self, samples: Sequence[Sample | ParameterGraph], batch: int | None = None) -> Tensor:
        """Predictions of samples or graphs, as ``Task.read`` has them, on the CPU."""
        return self.task.read(self.outputs(samples, batch))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``metanet.safetensors`` and ``config.json``, each whole or not at all."""
        from safetensors.torch import save

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        weights = save({k: v.detach().cpu().clone().contiguous() for k, v in self.metanet.state_dict().items()})
        config = {
            "format": FORMAT,
            "version": VERSION,
            "metanet": self.metanet.config,
            "task": self.task.to_dict(),
            "plan": self.plan.to_dict(),
            "made_of": self.made_of,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "history": list(self.history),
        }
        write_whole(target / WEIGHTS, weights)
        write_whole(target / CONFIG, json.dumps(config, indent=1).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Trained:
        """What ``save`` wrote, on the CPU. Raises ``MetanetError`` for a folder that is damaged or none of ours."""
        from safetensors.torch import load

        source = Path(folder)
        try:
            text, data = (source / CONFIG).read_bytes(), (source / WEIGHTS).read_bytes()
        except OSError as error:
            raise MetanetError(f"{source} holds no trained metanet: {error}") from error
        try:
            config = json.loads(text)
            if config["format"] != FORMAT or config["version"] != VERSION:
                raise MetanetError(
                    f"{source / CONFIG} is of the format {config['format']!r}, version {config['version']!r}; "
                    f"expected {FORMAT!r}, version {VERSION}"
                )
            if hashlib.sha256(data).hexdigest() != config["weights_sha256"]:
                raise MetanetError(f"{source / WEIGHTS} is not the file that {CONFIG} was written with; train again")
            metanet = build_metanet(config["metanet"])
            metanet.load_state_dict(load(data))
            task, plan = Task.from_dict(config["task"]), TrainingPlan.from_dict(config["plan"])
            return cls(metanet.eval(), task, plan, tuple(config["history"]), config["made_of"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise MetanetError(f"{source} holds a damaged metanet ({reason}); train it again") from error


def fit(
    plan: TrainingPlan,
    train: Sequence[Sample],
    validation: Sequence[Sample] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    metanet: Metanet | None = None,
    positives: Callable[[Mapping[str, Any]], str | None] | None = None,
    progress: bool = True,
) -> Trained:
    """Train a metanet; with ``validation`` samples the weights with the least validation loss are kept.

    ``out`` is the folder that the result is saved in, and an interrupted training's state until then; with
    ``resume`` the training goes on from there, or is loaded when it had come to its end. ``metanet`` starts from
    that one (it is trained in place) and not from a fresh one of the plan. ``positives`` gives of a record what
    makes networks positives of each other in a contrastive task, where a field of it does not say so.
    ``progress`` shows a bar on a terminal; elsewhere every epoch is a line of the log "weightspace.metanets".

    The same plan and samples give the same weights on a CPU, also when interrupted and resumed.
    Raises ``MetanetError`` where the samples do not fit the task, the folder holds another training, or the
    training diverges; ``MissingExtraError`` without lightning.
    """
    import sys

    try:
        from weightspace.metanets import loop as loops
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lightning":
            raise
        raise MissingExtraError("lightning", "train", "training a metanet") from error

    task = plan.make_task(train)
    made_of = _made_of(plan, metanet, train, validation)
    folder = Path(out) if out is not None else None
    checkpoint: Path | None = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            known = _training_in(folder)
            if known not in ("", made_of):
                raise MetanetError(
                    f"{folder} holds a training with another plan or other networks; choose another folder, "
                    "or train without resuming to replace it"
                )
            if known and (folder / CONFIG).is_file():
                return Trained.load(folder)
            if known and (folder / _CHECKPOINT).is_file():
                checkpoint = folder / _CHECKPOINT
        if checkpoint is None:
            for name in (_CHECKPOINT, CONFIG, WEIGHTS):
                (folder / name).unlink(missing_ok=True)
            begun = json.dumps({"made_of": made_of, "plan": plan.to_dict()}, indent=1)
            write_whole(folder / _UNFINISHED, begun.encode())

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(plan.seed)
        fresh = metanet is None
        if metanet is None:
            metanet = build_metanet({**plan.metanet, "outputs": task.outputs})
        targets, others = _targets(task, train, positives), _targets(task, validation, positives)
        batches = loops.Batches(metanet, task, plan, train, targets, lambda: 0)
        checks = loops.Batches(metanet, task, plan, validation, others) if validation else None
        if fresh and checkpoint is None and task.kind != "contrastive":
            metanet.begin(batches.prepared, lambda outputs, rows: task.loss(outputs, targets[rows]))
        steps = plan.epochs * len(batches)
        loop = loops.Loop(metanet, task, plan, steps, folder / _CHECKPOINT if folder is not None else None)
        loops.run(loop, batches, checks, checkpoint, progress and sys.stderr.isatty())
    if loop.best:
        metanet.load_state_dict(loop.best)
    trained = Trained(metanet.eval(), task, plan, tuple(loop.history), made_of)
    if folder is not None:
        trained.save(folder)
        for name in (_CHECKPOINT, _UNFINISHED):
            (folder / name).unlink(missing_ok=True)
    return trained


def _targets(
    task: Task, samples: Sequence[Sample], positives: Callable[[Mapping[str, Any]], str | None] | None
) -> Tensor:
    if not samples:
        return torch.empty(0)
    if positives is None:
        return task.targets(samples)
    if task.kind != "contrastive":
        raise MetanetError(f"positives belong to a contrastive task, this one is a {task.kind}")
    number: dict[Any, int] = {}
    keys = [(positives(sample.record) or None, sample.name) for sample in samples]
    return torch.tensor([number.setdefault(key if key is not None else (name,), len(number)) for key, name in keys])


def _made_of(
    plan: TrainingPlan, metanet: Metanet | None, train: Sequence[Sample], validation: Sequence[Sample]
) -> str:
    """A hash of the plan, the starting weights where given, and the names and records of the samples."""
    digest = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode())
    if metanet is not None:
        for name, value in metanet.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    for part in (train, validation):
        digest.update(b"part")
        for sample in part:
            digest.update(f"{sample.name}\0{json.dumps(dict(sample.record), sort_keys=True, default=str)}\0".encode())
    return digest.hexdigest()


def _training_in(folder: Path) -> str:
    """What the training in a folder, finished or not, is made of; empty where there is none."""
    for name in (CONFIG, _UNFINISHED):
        path = folder / name
        if path.is_file():
            try:
                return str(json.loads(path.read_bytes())["made_of"])
            except (ValueError, KeyError, TypeError) as error:
                raise MetanetError(f"{path} is damaged; remove the folder, or train without resuming") from error
    return ""
