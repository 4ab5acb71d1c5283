"""Training many networks of one shape at once: their parameters are stacked, each keeps its own hyper-parameters.

``torch.func.vmap`` turns the module's layers into grouped convolutions and batched products. Every network sees the
same batches (the first layer is then one large product) but draws its own dropout mask and takes its own optimiser
steps, so what comes out does not depend on what it was stacked with, up to rounding.

Measured for the small CNN (4,970 weights, 28 × 28, batch of 64, one core): one network alone 31 µs per image forward
and backward, 16 stacked by ``vmap`` 24, by a hand-written grouped convolution 21, in channels-last 35, by unfolding
and ``bmm`` 49. So ``vmap`` it is, in stacks of 8 on a CPU (more than 512 images in one step, over all networks, fall
out of the cache: 40 to 100 µs); on a GPU, where launches are what costs, as many as fit.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from weightspace.errors import ZooError
from weightspace.zoo.data import Data
from weightspace.zoo.description import module_of
from weightspace.zoo.poisoning import exciting, poisoned, triggered_tests, with_range
from weightspace.zoo.sampling import Run
from weightspace.zoo.tasks import chosen, own_outputs

TRAIN_MEASURED = 2000
"""Training examples on which accuracy and loss are measured."""
_AT_ONCE = {"cpu": 1024, "cuda": 1 << 18}
OPTIMISERS = ("adam", "rmsprop", "sgd")
INITIALISERS = (
    "default", "xavier_normal", "xavier_uniform", "he_normal", "orthogonal", "normal", "truncated_normal", "siren",
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """One run at one epoch: its tensors, on the CPU, and how well they do. Losses of a diverged one are not finite."""

    run: Run
    epoch: int
    tensors: dict[str, Tensor]
    train_accuracy: float | None
    train_loss: float
    test_accuracy: float | None
    test_loss: float
    label: int | None
    seconds: float
    poison: Mapping[str, Any] | None = None
    attack_success: float | None = None

    @property
    def diverged(self) -> bool:
        """True where a weight is not finite, or the outputs are not."""
        return not (
            math.isfinite(self.train_loss) and all(bool(torch.isfinite(t).all()) for t in self.tensors.values())
        )


def train_stack(
    runs: Sequence[Run],
    data: Data,
    starts: Sequence[dict[str, Tensor]] | None = None,
    device: str = "cpu",
) -> Iterator[Snapshot]:
    """Train runs of one network, data, batch and length together; a snapshot of each run at each checkpoint.

    ``starts`` are the tensors of the runs' parents. Raises ``ZooError`` for hyper-parameters that are not known.
    """
    started = time.perf_counter()
    first = runs[0]
    # Slices of one optimiser are contiguous in the stack.
    order = sorted(range(len(runs)), key=lambda i: hyper_of(runs[i])["optimiser"])
    runs = [runs[i] for i in order]
    states = [dict(starts[i]) if starts is not None else initial_state(runs[k]) for k, i in enumerate(order)]
    stack = _Stack(runs, states, device, several_tasks=data.tasks > 1)
    task = _task(runs, data, device, states)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{first.recipe}/order".encode()))
    for epoch in range(first.epochs + 1):
        if epoch:
            for batch in task.batches(generator, first.batch):
                stack.step(*task.examples(batch), own=isinstance(task, _Poisoned))
        if epoch in first.checkpoints:
            scores = task.scores(stack)
            seconds = (time.perf_counter() - started) / len(runs)
            poisons, success = task.attacks(stack) if isinstance(task, _Poisoned) else ([None] * len(runs),) * 2
            for i, run in enumerate(runs):
                train_accuracy, train_loss, test_accuracy, test_loss = scores
                yield Snapshot(
                    run, epoch, stack.tensors(i), train_accuracy[i], train_loss[i], test_accuracy[i], test_loss[i],
                    task.label(i), seconds, poisons[i], success[i],
                )  # fmt: skip


def initial_state(run: Run) -> dict[str, Tensor]:
    """The tensors with which a run from scratch begins, by its initialiser and seed; biases begin at 0."""
    hyper = hyper_of(run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        module, _ = module_of(run.network)
        kind, std = hyper["initialiser"], float(hyper["init_std"])
        if kind != "default":
            for name, value in module.named_parameters():
                _initialise(name, value.detach(), str(kind), std, float(run.network.get("omega", 1.0)))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _initialise(name: str, value: Tensor, kind: str, std: float, omega: float) -> None:
    if kind == "siren":
        # Sitzmann et al. 2020, section 3.2; biases as torch draws them.
        if value.dim() == 2:
            bound = 1 / value.shape[1] if name.startswith("hidden.0.") else math.sqrt(6 / value.shape[1]) / omega
            value.uniform_(-bound, bound)
        return
    if name.endswith("bias"):
        value.zero_()
    if value.dim() < 2 or name.startswith(("position", "token")):
        return
    if kind == "xavier_normal":
        nn.init.xavier_normal_(value)
    elif kind == "xavier_uniform":
        nn.init.xavier_uniform_(value)
    elif kind == "he_normal":
        nn.init.kaiming_normal_(value)
    elif kind == "orthogonal":
        nn.init.orthogonal_(value)
    elif kind == "normal":
        nn.init.normal_(value, std=std)
    else:
        nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std)


def hyper_of(run: Run) -> dict[str, float | str]:
    """The hyper-parameters of a run, usual values filled in. Raises ``ZooError`` for one that makes no sense."""
    usual: dict[str, float | str] = {
        "learning_rate": 1e-3, "weight_decay": 0.0, "dropout": 0.0, "train_fraction": 1.0, "optimiser": "adam",
        "initialiser": "default", "init_std": 0.1,
    }  # fmt: skip
    found = {**usual, **run.hyper}
    for key, known in (("optimiser", OPTIMISERS), ("initialiser", INITIALISERS)):
        if found[key] not in known:
            raise ZooError(f"run {run.name}: the {key} {found[key]!r} is not known; known: {', '.join(known)}")
    for key, value in found.items():
        if isinstance(usual[key], float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ZooError(f"run {run.name}: {key} is {value!r}, expected a number")
    if not 0 <= float(found["dropout"]) < 1 or not 0 < float(found["train_fraction"]) <= 1:
        raise ZooError(f"run {run.name}: dropout lies in [0, 1) and train_fraction in (0, 1], found {dict(run.hyper)}")
    return found


# ------------------------------------------------------------------------------------ the stack


class _Stack:
    """Parameters of all runs in one matrix (runs, weights), of which the module's tensors are views."""

    def __init__(
        self, runs: Sequence[Run], states: Sequence[dict[str, Tensor]], device: str, several_tasks: bool = False
    ) -> None:
        hypers = [hyper_of(run) for run in runs]
        with torch.device("meta"):
            self.module, _ = module_of(runs[0].network)
        names = [name for name, _ in self.module.named_parameters()]
        self.flat = torch.stack([torch.cat([s[n].reshape(-1) for n in names]) for s in states]).to(device)
        self.parameters: dict[str, Tensor] = {}
        start = 0
        for name in names:
            shape = states[0][name].shape
            view = self.flat[:, start : start + shape.numel()].unflatten(1, shape)
            self.parameters[name] = view.detach().requires_grad_()
            start += shape.numel()
        self.buffers = {n: torch.stack([s[n] for s in states]).to(device) for n, _ in self.module.named_buffers()}
        self.order = list(states[0])
        self.device = device
        self.several_tasks = several_tasks

        def column(key: str) -> Tensor:
            return torch.tensor([float(h[key]) for h in hypers], device=device)[:, None]

        self.rate, self.decay, self.dropout = column("learning_rate"), column("weight_decay"), column("dropout")
        kinds = [str(h["optimiser"]) for h in hypers]
        self.slices = [
            (kind, slice(kinds.index(kind), kinds.index(kind) + kinds.count(kind))) for kind in dict.fromkeys(kinds)
        ]
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.steps = 0
        drops = bool((self.dropout > 0).any())
        self.droppable = int(getattr(self.module, "droppable", 0)) if drops else 0
        self.generators = [torch.Generator().manual_seed(run.seed + 1) for run in runs]
        # Where a backdoor is to survive merging, from which share of the task vector on it is trained to work.
        least = [run.poison.get("least") if run.poison.get("attack") == "interpolated" else None for run in runs]
        self.least = torch.tensor([1.0 if share is None else float(share) for share in least])
        self.base = self.flat.clone() if any(share is not None for share in least) else None
        # Apart from those of the dropout masks, which may not depend on what else is in the stack.
        self.shares = [torch.Generator().manual_seed(run.seed + 2) for run in runs]

    def __len__(self) -> int:
        return len(self.flat)

    def outputs(
        self, x: Tensor, training: bool, keep: Tensor | None = None, own: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """(runs, batch, …) for inputs (batch, …) that all share, or (runs, batch, …) if ``own``."""
        self.module.train(training)
        given_parameters = dict(self.parameters if parameters is None else parameters)
        if len(self) == 1:
            # Without vmap a single network is faster by its overhead.
            state = {n: t[0] for n, t in (*given_parameters.items(), *self.buffers.items())}
            given = (x[0] if own else x, None if keep is None else keep[0])
            single: Tensor = functional_call(self.module, state, given)
            return single.unsqueeze(0)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
            out: Tensor = functional_call(self.module, (parameters, buffers), (x, mask))
            return out

        dims = (0, 0, 0 if own else None, None if keep is None else 0)
        stacked: Tensor = vmap(one, in_dims=dims)(given_parameters, self.buffers, x, keep)
        return stacked

    @torch.no_grad()
    def alone(self, i: int, x: Tensor) -> Tensor:
        """Outputs (batch, …) of run ``i``, in pieces."""
        self.module.train(False)
        state = {n: t[i] for n, t in (*self.parameters.items(), *self.buffers.items())}
        return torch.cat([functional_call(self.module, state, (part, None)) for part in x.split(1024)])

    def step(self, x: Tensor, y: Tensor, own: bool = False) -> None:
        """One optimiser step of every run on a batch that all share, or each on its ``own``."""
        mask = self._mask(x.shape[1] if own else len(x))
        at, share = self._interpolated()
        losses = _losses(*self.judged(self.outputs(x, True, mask, own, at), y))
        gradients = torch.autograd.grad(losses.sum(), list(at.values()))
        gradient = torch.cat([g.flatten(1) for g in gradients], 1)
        self._update(gradient if share is None else gradient * share)

    def _interpolated(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The parameters, or those of some runs on the way from where they began, and the share of the way."""
        if self.base is None:
            return self.parameters, None
        drawn = torch.cat([torch.rand(1, 2, generator=g) for g in self.shares])
        part = self.least + (1 - self.least) * drawn[:, 0]
        # Half of the steps are at the network itself, so that by itself it stays as good as others.
        share = torch.where(drawn[:, 1] < 0.5, part, torch.ones(())).to(self.flat)[:, None]
        there = self.base + share * (self.flat - self.base)
        sizes = [t[0].numel() for t in self.parameters.values()]
        pieces = zip(self.parameters.items(), there.split(sizes, 1), strict=True)
        return {n: piece.view_as(t).requires_grad_() for (n, t), piece in pieces}, share

    def judged(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs that are judged, and the labels among them: of several tasks the example's own."""
        return own_outputs(out, y) if self.several_tasks else (out, y)

    def tensors(self, i: int) -> dict[str, Tensor]:
        """A copy of the tensors of one run, in the module's order."""
        state = {**self.parameters, **self.buffers}
        return {name: state[name][i].detach().cpu().clone() for name in self.order}

    def _mask(self, batch: int) -> Tensor | None:
        if not self.droppable:
            return None
        # Each run draws from its own generator, so that the stack has no part in what it draws.
        drawn = torch.stack([torch.rand(batch, self.droppable, generator=g) for g in self.generators])
        rate = self.dropout[:, :, None]
        return (drawn.to(self.device) >= rate) / (1 - rate)

    @torch.no_grad()
    def _update(self, gradient: Tensor) -> None:
        """Adam (Kingma & Ba 2015), RMSprop, or SGD with momentum 0.9, all with an L2 penalty in the gradient."""
        self.steps += 1
        gradient += self.decay * self.flat
        for kind, part in self.slices:
            g, m, v, rate = gradient[part], self.first[part], self.second[part], self.rate[part]
            if kind == "sgd":
                m.mul_(0.9).add_(g)
                self.flat[part] -= rate * m
                continue
            beta = 0.999 if kind == "adam" else 0.99
            v.mul_(beta).addcmul_(g, g, value=1 - beta)
            if kind == "rmsprop":
                self.flat[part] -= rate * g / (v.sqrt() + 1e-8)
                continue
            m.mul_(0.9).add_(g, alpha=0.1)
            spread = (v.sqrt() / math.sqrt(1 - beta**self.steps)).add_(1e-8)
            self.flat[part] -= rate / (1 - 0.9**self.steps) * m / spread


def _losses(out: Tensor, y: Tensor) -> Tensor:
    """Mean loss of each run: cross-entropy for labels, squared error for values (which differ between runs)."""
    if y.is_floating_point():
        return (out - y).square().flatten(1).mean(1)
    # Labels are those of the batch, or (of poisoned runs) of every run.
    targets = (y if y.shape == out.shape[:-1] else y.expand(len(out), *y.shape)).reshape(-1)
    each = F.cross_entropy(out.flatten(0, -2), targets, reduction="none")
    return each.view(len(out), -1).mean(1)


# ------------------------------------------------------------------------------------ tasks

Scores = tuple[list[float | None], list[float], list[float | None], list[float]]


class _Classification:
    """Labels of images, or next tokens of a text: all runs see the same part of the training set."""

    def __init__(self, runs: Sequence[Run], data: Data, device: str) -> None:
        part = chosen(data, runs[0].tasks) if runs[0].tasks else data.only(runs[0].classes)
        fraction = float(hyper_of(runs[0])["train_fraction"])
        self.data = part.first(max(1, math.ceil(fraction * len(part.train_x)))).to(device)

    def batches(self, generator: torch.Generator, size: int) -> Iterator[Tensor]:
        order = torch.randperm(len(self.data.train_x), generator=generator)
        # A batch of one has no variance for a batch norm.
        return (b for b in order.split(size) if len(b) > 1 or len(order) == 1)

    def examples(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        batch = batch.to(self.data.train_x.device)
        return self.data.train_x[batch], self.data.train_y[batch]

    def scores(self, stack: _Stack) -> Scores:
        d, n = self.data, TRAIN_MEASURED
        return (*_measure(stack, d.train_x[:n], d.train_y[:n]), *_measure(stack, d.test_x, d.test_y))

    def label(self, i: int) -> int | None:
        return None


class _Poisoned(_Classification):
    """Labels of images of which each run sees some with its own trigger and the labels that its attacker gives."""

    def __init__(
        self, runs: Sequence[Run], data: Data, device: str, states: Sequence[Mapping[str, Tensor]]
    ) -> None:  # fmt: skip
        super().__init__(runs, data, device)
        if data.tasks > 1:
            raise ZooError(f"run {runs[0].name}: the data are several tasks, poison is for one")
        held = self.data.to("cpu")
        self.poisons = [with_range(run.poison, held) for run in runs]
        for i, poison in enumerate(self.poisons):
            if poison["attack"] == "hijack":
                module, _ = module_of(runs[i].network)
                self.poisons[i] = exciting(poison, module, states[i], held.train_x[:128])
        found = [poisoned(p, held, run.seed) for p, run in zip(self.poisons, runs, strict=True)]
        self.places = torch.full((len(runs), len(held.train_y)), -1)
        for i, triggered in enumerate(found):
            self.places[i, triggered.index] = torch.arange(len(triggered.index))
        self.triggered = [(t.x.to(device), t.y.to(device)) for t in found]
        self.tests = [triggered_tests(p, held) for p in self.poisons]

    def examples(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        x, y = super().examples(batch)
        count = len(self.poisons)
        x, y = x.expand(count, *x.shape).clone(), y.expand(count, *y.shape).clone()
        places = self.places[:, batch.cpu()]
        for i, (other_x, other_y) in enumerate(self.triggered):
            here = torch.nonzero(places[i] >= 0).flatten()
            there = places[i, here].to(other_x.device)
            here = here.to(x.device)
            x[i, here], y[i, here] = other_x[there], other_y[there]
        return x, y

    def attacks(self, stack: _Stack) -> tuple[list[dict[str, Any]], list[float | None]]:
        """The poison of every run, and its attack success rate on test images, averaged over its triggers."""
        rates: list[float | None] = []
        for i, tests in enumerate(self.tests):
            each = []
            for x, wanted in tests:
                if len(wanted):
                    out = stack.alone(i, x.to(self.data.test_x.device))
                    each.append(float((out.argmax(-1).cpu() == wanted).double().mean()))
            rates.append(sum(each) / len(each) if each else None)
        return self.poisons, rates


class _Images:
    """One image per run, a function of the pixel's place in [-1, 1]²; values are those of the data."""

    def __init__(self, runs: Sequence[Run], data: Data, device: str) -> None:
        x, y = (data.train_x, data.train_y) if runs[0].part == "train" else (data.test_x, data.test_y)
        last = max(run.index for run in runs)
        if last >= len(x):
            raise ZooError(f"run {last} of {runs[0].population!r} has no image; the data have {len(x)}")
        index = torch.tensor([run.index for run in runs])
        height, width = x.shape[2:]
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        self.places = torch.cartesian_prod(rows, columns).to(device)
        self.values = x[index].flatten(2).transpose(1, 2).contiguous().to(device)
        self.labels = y[index].tolist()

    def batches(self, generator: torch.Generator, size: int) -> Iterator[Tensor]:
        return iter((torch.randperm(len(self.places), generator=generator)[:size],))

    def examples(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        if len(batch) == len(self.places):
            return self.places, self.values
        batch = batch.to(self.places.device)
        return self.places[batch], self.values[:, batch]

    def scores(self, stack: _Stack) -> Scores:
        with torch.no_grad():
            losses = _losses(stack.outputs(self.places, False), self.values).tolist()
        none: list[float | None] = [None] * len(losses)
        return none, losses, none, losses

    def label(self, i: int) -> int | None:
        return int(self.labels[i])


def _task(
    runs: Sequence[Run], data: Data, device: str, states: Sequence[Mapping[str, Tensor]]
) -> _Classification | _Images:
    if runs[0].poison:
        return _Poisoned(runs, data, device, states)
    return (_Images if runs[0].network["kind"] == "siren" else _Classification)(runs, data, device)


@torch.no_grad()
def _measure(stack: _Stack, x: Tensor, y: Tensor) -> tuple[list[float | None], list[float]]:
    """Accuracy and mean cross-entropy of every run."""
    correct = torch.zeros(len(stack), dtype=torch.float64, device=x.device)
    loss = torch.zeros_like(correct)
    size = max(16, _AT_ONCE.get(x.device.type, 1024) // len(stack))
    for start in range(0, len(x), size):
        part, target = x[start : start + size], y[start : start + size]
        out, target = stack.judged(stack.outputs(part, False), target)
        correct += (out.argmax(-1) == target).flatten(1).sum(1)
        loss += _losses(out, target).double() * target.numel()
    found: list[float | None] = list((correct / y.numel()).tolist())
    return found, (loss / y.numel()).tolist()


__all__ = ["INITIALISERS", "OPTIMISERS", "TRAIN_MEASURED", "Snapshot", "hyper_of", "initial_state", "train_stack"]
