"""What a metanet is trained for: regression, classification, ranking, or an embedding by contrast.

A ``Task`` knows the targets of samples, the loss of raw outputs, and what the outputs mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from weightspace.errors import MetanetError
from weightspace.metanets import metrics
from weightspace.metanets.data import Sample, field_of

Kind = Literal["regression", "classification", "ranking", "contrastive"]
Loss = Literal["mse", "bce"]

# Names for what is asked most often: the kind of task and the expression over the record.
NAMED: Mapping[str, tuple[Kind, str]] = {
    "accuracy": ("regression", "test_accuracy"),
    "loss": ("regression", "test_loss"),
    "generalisation-gap": ("regression", "train_accuracy - test_accuracy"),
    "ranking": ("ranking", "test_accuracy"),
    "embedding": ("contrastive", ""),
}
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Task:
    """A kind of task with what it learned from its training set; ``make_task`` makes one.

    - ``regression``: one output. A ``bounded`` target lies in [0, 1] and is the sigmoid of
      ``shift + scale * output``, trained by cross-entropy (``bce``) or squared error (``mse``) in [0, 1]; another
      is ``shift + scale * output``, trained by squared error in units of ``scale``.
    - ``classification``: an output per class of ``classes``; cross-entropy.
    - ``ranking``: one output, only its order counts; logistic loss over all pairs of a batch whose targets differ.
    - ``contrastive``: the direction of the outputs. Two views of each network are in the batch; NT-Xent (Chen et
      al. 2020) with ``temperature``, where several positives count alike (Khosla et al. 2020). ``target`` names a
      field of the record that makes networks positives of each other ("run", "parent"); empty: own views only.
    """

    kind: Kind
    target: str
    outputs: int = 1
    classes: tuple[Any, ...] = ()
    bounded: bool = False
    loss_of: Loss = "mse"
    shift: float = 0.0
    scale: float = 1.0
    temperature: float = 0.1

    # ---------------------------------------------------------------- targets

    def targets(self, samples: Sequence[Sample]) -> Tensor:
        """What the samples should give, ``(n,)``: float32, or int64 for classes and positives.

        Raises ``MetanetError`` where a record has no such field or a class that the training set has not.
        """
        if self.kind == "contrastive":
            return _numbered([_positive(sample, self.target) for sample in samples])
        if self.kind == "classification":
            number = {_class(c): i for i, c in enumerate(self.classes)}
            found = [number.get(_class(value), -1) for value in _values(samples, self.target)]
            if -1 in found:
                value = field_of(samples[found.index(-1)].record, self.target)
                raise MetanetError(
                    f"{samples[found.index(-1)].name} has {self.target} = {value!r}, which no network of the training "
                    f"set has; known: {', '.join(map(str, self.classes[:20]))}"
                )
            return torch.tensor(found, dtype=torch.int64)
        return torch.tensor(_numbers(samples, self.target), dtype=torch.float32)

    # ---------------------------------------------------------------- loss

    def loss(
        self, outputs: Tensor, targets: Tensor, others: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor:
        """Mean loss of raw outputs ``(n, outputs)``, a scalar.

        Of mixed networks ``others (n,)`` are the targets of the partners and ``share (n,)`` the weight of
        ``targets``. A contrastive batch has first views and second views one after the other, ``2n`` outputs.
        """
        if self.kind == "contrastive":
            return nt_xent(outputs.float(), targets, self.temperature)
        if self.kind == "classification":
            own = F.cross_entropy(outputs.float(), targets, reduction="none")
            if others is not None and share is not None:
                own = share * own + (1 - share) * F.cross_entropy(outputs.float(), others, reduction="none")
            return own.mean()
        if others is not None and share is not None:
            targets = share * targets + (1 - share) * others
        score = outputs[:, 0].float()
        if self.kind == "ranking":
            return pairwise_logistic(score, targets)
        raw = self.shift + self.scale * score
        if not self.bounded:
            return ((raw - targets) / self.scale).square().mean()
        if self.loss_of == "bce":
            # Less the entropy of the targets, which nothing can learn away: 0 is a perfect prediction.
            least = -torch.xlogy(targets, targets) - torch.xlogy(1 - targets, 1 - targets)
            return (F.binary_cross_entropy_with_logits(raw, targets, reduction="none") - least).mean()
        return (torch.sigmoid(raw) - targets).square().mean()

    # ---------------------------------------------------------------- meaning

    def read(self, outputs: Tensor) -> Tensor:
        """Predictions: values ``(n,)``, class probabilities ``(n, classes)``, scores ``(n,)`` or unit vectors."""
        outputs = outputs.float()
        if self.kind == "contrastive":
            return F.normalize(outputs, dim=1)
        if self.kind == "classification":
            return outputs.softmax(1)
        if self.kind == "ranking":
            return outputs[:, 0]
        raw = self.shift + self.scale * outputs[:, 0]
        return torch.sigmoid(raw) if self.bounded else raw

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Figures of merit of raw outputs; of a contrastive batch as ``loss`` has it."""
        found = self.read(outputs).cpu()
        targets = targets.cpu()
        if self.kind == "contrastive":
            n = len(targets)
            alike = targets[:, None] == targets[None, :]
            return {"recall@1": metrics.recall_at(1, found[:n], found[n:], alike)}
        if self.kind == "classification":
            return {"accuracy": metrics.accuracy(targets, found)}
        tau = metrics.kendall_tau(targets, found)
        if self.kind == "ranking":
            return {"tau": tau}
        return {
            "tau": tau,
            "r2": metrics.r_squared(targets, found),
            "mae": metrics.mean_absolute_error(targets, found),
        }

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON can hold it."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Task:
        """What ``to_dict`` gave."""
        return cls(**{**found, "classes": tuple(found["classes"])})


def make_task(
    kind: Kind,
    target: str,
    train: Sequence[Sample],
    *,
    bounded: bool | None = None,
    loss_of: Loss = "bce",
    outputs: int = 64,
    temperature: float = 0.1,
) -> Task:
    """A task whose classes, or shift and scale, are those of a training set.

    ``target`` is a field of the record by its dotted path, or a difference of two, ``"train_accuracy -
    test_accuracy"``. ``bounded`` says that a regression target lies in [0, 1] (default: whether it is called an
    accuracy). ``outputs`` is the size of a contrastive embedding.
    Raises ``MetanetError`` for targets that are missing, no numbers, out of bounds, or all the same.
    """
    if kind not in get_args(Kind):
        raise MetanetError(f"there is no task of the kind {kind!r}; known: {', '.join(get_args(Kind))}")
    if not train:
        raise MetanetError("a task needs networks to learn from; the training set is empty")
    if kind == "contrastive":
        return Task(kind, target, outputs, temperature=temperature)
    if kind == "classification":
        values = {_class(v): v for v in _values(train, target)}
        classes = tuple(values[key] for key in sorted(values))
        if not 2 <= len(classes) <= _MOST_CLASSES:
            raise MetanetError(
                f"{target} has {len(classes)} different values in the training set; "
                f"a classification needs between 2 and {_MOST_CLASSES}"
            )
        return Task(kind, target, len(classes), classes)
    numbers = torch.tensor(_numbers(train, target), dtype=torch.float64)
    if float(numbers.min()) == float(numbers.max()):
        raise MetanetError(f"{target} is {float(numbers[0])} for every network of the training set; nothing to learn")
    if kind == "ranking":
        return Task(kind, target)
    if bounded is None:
        bounded = target.endswith("accuracy") and " - " not in target
    if not bounded:
        return Task(kind, target, loss_of="mse", shift=float(numbers.mean()), scale=float(numbers.std()) or 1.0)
    if float(numbers.min()) < 0 or float(numbers.max()) > 1:
        raise MetanetError(
            f"{target} lies between {float(numbers.min()):.3g} and {float(numbers.max()):.3g}; a bounded target "
            "lies in [0, 1]: pass bounded=False"
        )
    logits = torch.logit(numbers.clamp(0.01, 0.99))
    scale = float(logits.std())
    return Task(
        kind, target, bounded=True, loss_of=loss_of, shift=float(torch.logit(numbers.mean())), scale=max(scale, 0.1)
    )


def named(name: str, samples: Sequence[Sample]) -> tuple[Kind, str]:
    """Kind and target of a task by its name (``NAMED``), or of a field of the record.

    A field of numbers with a decimal point is a regression; texts, truths and whole numbers are classes.
    Raises ``MetanetError`` when the records have no such field.
    """
    if name in NAMED:
        return NAMED[name]
    found = [field_of(sample.record, name) for sample in samples]
    present = [value for value in found if value is not None]
    if not present:
        fields = sorted({key for sample in samples[:100] for key in sample.record})
        raise MetanetError(
            f"there is no task {name!r}: it is none of {', '.join(NAMED)}, and no record has such a field; "
            f"the records have {', '.join(fields) or 'no fields at all'}"
        )
    return ("regression" if any(isinstance(value, float) for value in present) else "classification"), name


# -------------------------------------------------------------------- losses


def pairwise_logistic(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean of log(1 + exp(-(s_i - s_j))) over the pairs with target i above target j (Burges et al. 2005)."""
    above = targets[:, None] > targets[None, :]
    losses = F.softplus(scores[None, :] - scores[:, None])
    return (losses * above).sum() / above.sum().clamp(min=1)


def nt_xent(outputs: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Contrast of ``2n`` outputs, both views of networks with the numbers ``ids (n,)``: equal ids are positives.

    With ids that all differ it is NT-Xent (Chen et al. 2020); with others the mean over all positives outside
    the logarithm (Khosla et al. 2020).
    """
    unit = F.normalize(outputs, dim=1)
    both = torch.cat((ids, ids))
    alike = unit @ unit.T / temperature
    itself = torch.eye(len(both), dtype=torch.bool, device=alike.device)
    log = F.log_softmax(alike.masked_fill(itself, -math.inf), dim=1)
    positive = (both[:, None] == both[None, :]) & ~itself
    return -(log.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)).mean()


# -------------------------------------------------------------------- values of records


def _values(samples: Sequence[Sample], target: str) -> list[Any]:
    found = [field_of(sample.record, target) for sample in samples]
    missing = [sample.name for sample, value in zip(samples, found, strict=True) if value is None]
    if missing:
        raise MetanetError(
            f"{len(missing)} of {len(samples)} networks have no {target!r} in their record, the first is "
            f"{missing[0]!r}; leave them out with a condition on the record"
        )
    return found


def _numbers(samples: Sequence[Sample], target: str) -> list[float]:
    first, minus, second = (part.strip() for part in target.partition(" - "))
    columns = [_values(samples, first), *([_values(samples, second)] if minus else [])]
    for name, column in zip((first, second), columns, strict=False):
        for sample, value in zip(samples, column, strict=True):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise MetanetError(f"{sample.name} has {name} = {value!r}; a {target!r} needs finite numbers")
    if not minus:
        return [float(value) for value in columns[0]]
    return [float(a) - float(b) for a, b in zip(*columns, strict=True)]


def _class(value: Any) -> tuple[str, Any]:
    """Something to tell and sort classes by: numbers among numbers, the rest by its text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value).__name__, str(value)
    return "", value


def _positive(sample: Sample, target: str) -> str:
    """What makes a sample a positive of others; of one without the field, itself alone."""
    value = field_of(sample.record, target) if target else None
    return f"itself {sample.name}" if value is None else f"field {value}"


def _numbered(keys: Sequence[str]) -> Tensor:
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(key, len(number)) for key in keys], dtype=torch.int64)
