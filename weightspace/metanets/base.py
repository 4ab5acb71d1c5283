"""What every metanetwork is: parameter graphs in, a row of outputs per network out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightspace.errors import MetanetError

if TYPE_CHECKING:
    from weightspace.graph import ParameterGraph

# Kind in a configuration -> the class, imported when it is asked for.
KINDS: Mapping[str, str] = {
    "operator": "weightspace.metanets.operator:OperatorMetanet",
    "gmn": "weightspace.metanets.gmn:Gmn",
    "neural-graphs": "weightspace.metanets.neural_graphs:NeuralGraphs",
    "scalegmn": "weightspace.metanets.scalegmn:ScaleGmn",
    "answering": "weightspace.metanets.answering:Answering",
}


class Metanet(nn.Module):
    """A network that reads networks.

    ``prepare`` turns a parameter graph into what this metanet wants to know of it, once and without gradients;
    ``collate`` makes a batch of several such items; ``forward`` maps a batch to ``(networks, outputs)``.
    Calling the metanet on parameter graphs themselves does all three.

    ``config`` holds ``"kind"`` and the options of the constructor: ``build_metanet(config)`` makes it again.
    """

    config: dict[str, Any]

    def prepare(self, graph: ParameterGraph) -> Any:
        """What this metanet needs of one network; raises ``MetanetError`` where it cannot represent it."""
        raise NotImplementedError

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch of prepared networks, with ``to(device)`` and ``size``, the number of networks."""
        raise NotImplementedError

    def begin(self, prepared: Callable[[], Sequence[Any]], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Called once before a training from scratch; a part that is trained in seconds may be trained here.

        ``prepared`` gives all networks of the training set, prepared; ``loss`` that of outputs ``(n, outputs)`` for
        the numbers ``(n,)`` of their networks.
        """

    def begun(self) -> list[nn.Parameter]:
        """The parameters that ``begin`` trains; a plan may let them learn more slowly afterwards."""
        return []

    @property
    def preparation(self) -> Hashable:
        """What ``prepare`` and ``collate`` depend on: metanets with equal ones take each other's items and batches."""
        return id(self)

    def read(self, *graphs: ParameterGraph) -> Tensor:
        """Outputs of parameter graphs, ``(networks, outputs)``, without gradients, on the device of the metanet."""
        return self.answer(self.batched(graphs))

    def batched(self, graphs: Sequence[ParameterGraph]) -> Any:
        """One batch of parameter graphs, without gradients."""
        with torch.no_grad():
            return self.collate([self.prepare(g) for g in graphs])

    def answer(self, batch: Any) -> Tensor:
        """Outputs of a batch, ``(networks, outputs)``, without gradients, on the device of the metanet."""
        device = next(self.parameters()).device
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                found: Tensor = self(batch.to(device))
        finally:
            self.train(training)
        return found


def build_metanet(config: Mapping[str, Any]) -> Metanet:
    """A fresh metanet from its configuration: ``{"kind": "operator", "outputs": 1, …}``.

    With ``"answers": True`` one of any kind hears the answers of the networks too (``metanets.answering``), and with
    ``"questions": 32, "classes": 10`` those to so many learned images; with ``"statistics": True`` it is told the flat
    baselines' statistics, too.
    Raises ``MetanetError`` for a kind or an option that does not exist.
    """
    options = dict(config)
    if options.pop("answers", False):
        own = ("outputs", "questions", "classes", "statistics")
        inner = {k: v for k, v in options.items() if k not in own}
        options = {"kind": "answering", "inner": inner, **{k: v for k, v in options.items() if k in own}}
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise MetanetError(f"there is no metanet of the kind {kind!r}; known: {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    try:
        made = getattr(import_module(module), name)(**options)
    except TypeError as error:
        raise MetanetError(f"the metanet {kind!r} does not take these options: {error}") from error
    assert isinstance(made, Metanet)
    return made
