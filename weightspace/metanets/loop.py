"""The training loop: batches of prepared networks, and the lightning module that they go through.

Imported on use, since it needs lightning. Whatever is random in an epoch follows from the plan's seed and the
number of the epoch alone, so a training that goes on after an interruption gives what it would have given.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor

from weightspace.errors import MetanetError
from weightspace.metanets.base import Metanet
from weightspace.metanets.data import Sample
from weightspace.metanets.tasks import Task
from weightspace.paths import whole

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph
    from weightspace.metanets.training import TrainingPlan

# Seconds of training that an interruption may cost.
SAVE_EVERY = 10.0
_SAVED = "weightspace"
# A batch, the targets of its networks and, where networks were mixed, those of the partners and the shares.
Example = tuple[Any, Tensor, Tensor | None, Tensor | None]


class Batches:
    """The batches of an epoch; networks are dealt into them anew every ``plan.deal_every`` epochs.

    Networks are prepared once, unless augmentation changes them each time. Sizes of batches differ by one at
    most. For validation nothing is shuffled, and the views of a contrastive task stay the same.
    """

    def __init__(
        self,
        metanet: Metanet,
        task: Task,
        plan: TrainingPlan,
        samples: Sequence[Sample],
        targets: Tensor,
        epoch: Callable[[], int] | None = None,
    ) -> None:
        self.metanet, self.task, self.plan = metanet, task, plan
        self.graphs: list[ParameterGraph] = [sample.graph for sample in samples]
        self.targets, self.epoch = targets, epoch
        self.views = task.kind == "contrastive"
        self.fixed = epoch is None or not (self.views or plan.augmentation.changes or plan.augmentation.mixup)
        self.items: list[Any] = []
        self.dealt: tuple[int, list[Example]] | None = None

    def __len__(self) -> int:
        return -(-len(self.graphs) // self.plan.batch)

    def __iter__(self) -> Iterator[Example]:
        epoch = self.epoch() if self.epoch is not None else 0
        deal = epoch // self.plan.deal_every
        if self.fixed and (self.epoch is None or self.plan.deal_every > 1):
            if self.dealt is None or self.dealt[0] != deal:
                self.dealt = deal, list(self._examples(_generator(self.plan.seed, 1, deal)))
            kept = self.dealt[1]
            order = torch.arange(len(kept))
            if self.epoch is not None:
                order = torch.randperm(len(kept), generator=_generator(self.plan.seed, 2, epoch))
            yield from (kept[number] for number in order.tolist())
            return
        yield from self._examples(_generator(self.plan.seed, 1, epoch))

    def prepared(self) -> list[Any]:
        """The networks as they are, prepared once."""
        if not self.items:
            with torch.no_grad():
                self.items = [self.metanet.prepare(graph) for graph in self.graphs]
        return self.items

    def _examples(self, generator: torch.Generator) -> Iterator[Example]:
        order = self._order(generator)
        with torch.no_grad():
            for rows in torch.tensor_split(order, len(self)):
                yield self._example(rows, generator)

    def _example(self, rows: Tensor, generator: torch.Generator) -> Example:
        targets = self.targets[rows]
        augmentation = self.plan.augmentation
        if self.views:
            graphs = [self.graphs[i] for i in rows.tolist()]
            both = [augmentation(graph, generator) for _ in range(2) for graph in graphs]
            return self.metanet.collate([self.metanet.prepare(graph) for graph in both]), targets, None, None
        if self.fixed:
            items = self.prepared()
            return self.metanet.collate([items[i] for i in rows.tolist()]), targets, None, None
        graphs = [self.graphs[i] for i in rows.tolist()]
        others = shares = None
        if augmentation.mixup:
            graphs, partners, share = augmentation.mixed(graphs, generator)
            others, shares = targets[partners], torch.tensor(share)
        if augmentation.changes:
            graphs = [augmentation(graph, generator) for graph in graphs]
        return self.metanet.collate([self.metanet.prepare(graph) for graph in graphs]), targets, others, shares

    def _order(self, generator: torch.Generator) -> Tensor:
        n = len(self.graphs)
        if self.epoch is None:
            return torch.arange(n)
        order = torch.randperm(n, generator=generator)
        if not self.views or len(self.targets.unique()) == n:
            return order
        # Positives of each other go side by side, two by two: scattered at random they would rarely meet.
        waiting: dict[int, int] = {}
        units: list[list[int]] = []
        for number, key in zip(order.tolist(), self.targets[order].tolist(), strict=True):
            if key in waiting:
                units.append([waiting.pop(key), number])
            else:
                waiting[key] = number
        units += [[number] for number in waiting.values()]
        mixed = torch.randperm(len(units), generator=generator).tolist()
        return torch.tensor([number for unit in mixed for number in units[unit]])


class Loop(lightning.LightningModule):
    """One training: loss, optimiser with warm-up and cosine decay, validation after every epoch, best weights."""

    def __init__(self, metanet: Metanet, task: Task, plan: TrainingPlan, steps: int, save_to: Path | None) -> None:
        super().__init__()
        self.metanet, self.task, self.plan, self.steps, self.save_to = metanet, task, plan, steps, save_to
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf
        # Running averages of the parameters, in their order, where the plan wants them; and them while it is used.
        self.average: list[Tensor] = []
        self._own: list[Tensor] = []
        self.advance: Callable[[str], None] | None = None
        self._losses: list[Tensor] = []
        self._validation: dict[str, float] = {}
        self._found: list[tuple[Tensor, Tensor]] = []
        self._started = self._saved = time.perf_counter()

    # ---------------------------------------------------------------- training

    def on_train_epoch_start(self) -> None:
        self._started = time.perf_counter()
        self._losses, self._validation = [], {}
        torch.manual_seed(_mixed(self.plan.seed, 3, self.current_epoch))

    def training_step(self, example: Example, number: int) -> Tensor:
        batch, targets, others, share = example
        loss = self.task.loss(self.metanet(batch), targets, others, share)
        self._losses.append(loss.detach())
        if self.advance is not None:
            self.advance(_line(self.history[-1]) if self.history else "")
        return loss

    def on_train_batch_end(self, outputs: Any, example: Example, number: int) -> None:
        if self.plan.average:
            now = [p.detach() for p in self.metanet.parameters()]
            if not self.average:
                self.average = [p.clone() for p in now]
            self.average = [a.to(p.device) for a, p in zip(self.average, now, strict=True)]
            # Young averages forget faster, so that the first weights do not weigh on them.
            decay = min(self.plan.average, (1 + self.global_step) / (10 + self.global_step))
            torch._foreach_lerp_(self.average, now, 1 - decay)

    def on_train_epoch_end(self) -> None:
        loss = float(torch.stack(self._losses).mean())
        epoch = self.current_epoch + 1
        if not math.isfinite(loss):
            raise MetanetError(
                f"the training diverged in epoch {epoch} (loss {loss}); lower the learning rate, now "
                f"{self.plan.learning_rate:g}, or clip more than at {self.plan.clip:g}"
            )
        seconds = round(time.perf_counter() - self._started, 3)
        row = {"epoch": float(epoch), "train_loss": loss, **self._validation, "seconds": seconds}
        self.history.append(row)
        if self.advance is None:
            logging.getLogger("weightspace.metanets").info("epoch %d/%d: %s", epoch, self.plan.epochs, _line(row))
        if self.save_to is not None and time.perf_counter() - self._saved >= SAVE_EVERY:
            with whole(self.save_to) as temporary:
                self.trainer.save_checkpoint(temporary)
            self._saved = time.perf_counter()

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._found = []
        self.use_average()

    def validation_step(self, example: Example, number: int) -> None:
        self._found.append((self.metanet(example[0]), example[1]))

    def on_validation_epoch_end(self) -> None:
        outputs, targets = [o for o, _ in self._found], torch.cat([t for _, t in self._found])
        if self.task.kind == "contrastive":
            # Over batches as in training: the loss grows with the number of others.
            weights = [len(t) / len(targets) for _, t in self._found]
            loss = sum(w * float(self.task.loss(o, t)) for w, (o, t) in zip(weights, self._found, strict=True))
            views = [o.chunk(2) for o in outputs]
            joined = torch.cat([v[0] for v in views] + [v[1] for v in views])
        else:
            joined = torch.cat(outputs)
            loss = float(self.task.loss(joined, targets))
        self._found = []
        finite = bool(torch.isfinite(joined).all())
        measures = self.task.measures(joined, targets) if finite else {}
        self._validation = {"validation_loss": loss, **{f"validation_{k}": v for k, v in measures.items()}}
        self.log("validation_loss", loss, logger=False)
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {k: v.detach().cpu().clone() for k, v in self.metanet.state_dict().items()}
        self.use_own()

    def use_average(self) -> None:
        """Put the averages of the parameters in their place, where there are any."""
        if self.average:
            self._own = [p.detach().clone() for p in self.metanet.parameters()]
            _put(self.metanet, self.average)

    def use_own(self) -> None:
        """Put the parameters back that ``use_average`` replaced."""
        if self._own:
            _put(self.metanet, self._own)
            self._own = []

    # ---------------------------------------------------------------- optimiser

    def configure_optimizers(self) -> Any:
        plan = self.plan
        own = [p for p in self.metanet.parameters() if p.requires_grad]
        slow = {id(p) for p in self.metanet.begun()} if plan.begun != 1 else set()
        # Biases and the gains of norms are no directions that decay makes sense for.
        groups = [
            {
                "params": [p for p in own if (p.dim() > 1) == matrices and (id(p) in slow) == late],
                "weight_decay": plan.weight_decay if matrices else 0.0,
                "lr": plan.learning_rate * (plan.begun if late else 1),
            }
            for late in (False, True)
            for matrices in (True, False)
        ]
        # Fused is fastest; in mixed precision lightning clips no gradients for it.
        fused = plan.precision == "32-true"
        optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.learning_rate, fused=fused)
        warmup = max(1, round(plan.warmup * self.steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, self.steps - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---------------------------------------------------------------- resuming

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_SAVED] = {"history": self.history, "best": self.best, "best_loss": self.best_loss}
        checkpoint[_SAVED]["average"] = [a.cpu() for a in self.average]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint[_SAVED]
        self.history, self.best, self.best_loss = saved["history"], saved["best"], saved["best_loss"]
        self.average = saved["average"]


def run(
    loop: Loop, train: Batches, validation: Batches | None, checkpoint: Path | None, progress: bool
) -> None:
    """Train to the end of the plan, from a checkpoint where one is given."""
    from weightspace.progress import bar

    plan = loop.plan
    accelerator = {"auto": "auto", "cpu": "cpu", "cuda": "gpu", "mps": "mps"}[plan.device]
    callbacks: list[Callback] = []
    if plan.patience and validation:
        callbacks.append(EarlyStopping("validation_loss", patience=plan.patience))
    with _quiet():
        trainer = lightning.Trainer(
            accelerator=accelerator, devices=1, precision=plan.precision, max_epochs=plan.epochs,
            gradient_clip_val=plan.clip or None, callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=10**9,
        )  # fmt: skip
        with bar("training", plan.epochs * len(train), progress) as advance:
            loop.advance = advance if progress else None
            train.epoch = lambda: loop.current_epoch
            try:
                trainer.fit(loop, train, validation, ckpt_path=checkpoint, weights_only=True)
                if not loop.best:
                    loop.use_average()
            except SystemExit as stop:
                # What lightning makes of Ctrl-C.
                raise KeyboardInterrupt from stop
            finally:
                loop.advance = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's greetings and hints are not for our users; nor is its lasting change of what Ctrl-C does."""
    import signal
    import threading

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)


def _put(metanet: Metanet, values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(metanet.parameters(), values, strict=True):
            parameter.copy_(value)


def _line(row: dict[str, float]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k != "epoch")


def _mixed(*numbers: int) -> int:
    """A seed of its own for every (seed, purpose, epoch)."""
    import zlib

    return zlib.crc32("/".join(map(str, numbers)).encode())


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*numbers))
