"""A learned matcher: a metanet says what each element does, and alike elements are laid on each other.

Navon et al. 2023 ("Equivariant deep weight space alignment", Deep-Align) train a network that reads two others and
gives the permutations between them in one pass. Here one operator metanet (``weightspace.metanets``) reads each network
on its own; it is equivariant, so that its states of the axis elements move with them, and the similarity of two
networks' states is an assignment problem for each factor. No search goes back and forth between factors, so the time
is that of two passes and one assignment each; weight matching then starts from what was found.

What comes with the package was trained on small networks (``files/MODEL_CARD.md``). It finds noisy copies of networks
and architectures it has not seen, but cold weight matching finds them as well, mostly faster, and between independent
trainings both end alike: see ``tests/benchmarks/alignment.py matcher``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align.alignment import Found
from weightspace.errors import AlignmentError
from weightspace.graph import ParameterGraph
from weightspace.graph.build import of_tensors
from weightspace.metanets.batch import Batch, Item
from weightspace.metanets.operator import OperatorMetanet
from weightspace.metanets.structure import Structure
from weightspace.paths import write_whole
from weightspace.tagged import facts_of
from weightspace.wiring.matching import Matching, assign, float32
from weightspace.wiring.wiring import Permutation, Wiring

FILE = Path(__file__).resolve().parent / "files" / "matcher.safetensors"
_FORMAT, _VERSION = "weightspace-matcher", 1
States = dict[str, Tensor]


class ElementEncoder(nn.Module):
    """States of axis elements: an operator metanet, and a linear layer that says what of them is compared."""

    def __init__(self, width: int = 48, rounds: int = 3, probes: int = 32, outputs: int = 64) -> None:
        super().__init__()
        self.config = {"width": width, "rounds": rounds, "probes": probes, "outputs": outputs}
        self.metanet = OperatorMetanet(1, width=width, rounds=rounds, probes=probes, transfer=True, embedding=1)
        self.head = nn.Linear(self.metanet.state_width, outputs, bias=False)

    def prepare(self, tensors: Mapping[str, Tensor], wiring: Wiring) -> Item:
        """A network as the metanet reads it."""
        return self.metanet.prepare(graph_of(tensors, wiring))

    def forward(self, batch: Batch) -> Tensor:
        """``(nodes, outputs)`` in the order of the batch."""
        found: Tensor = self.head(self.metanet.states(batch))
        return found


def learned(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], wiring: Wiring, *, seed: int = 0, refine: bool = True,
    matcher: str | Path | None = None,
) -> Found:  # fmt: skip
    """The permutations between elements that the matcher reads as alike; ``refine``: with weight matching from there.

    ``matcher``: file of another one (``save_matcher``) instead of that which comes with the package. Where refining
    from b as it is ends higher, that is kept. ``diagnostics`` has the weight cosine ``found`` before refining, and the
    seconds of both parts.
    """
    encoder = load_matcher(Path(matcher) if matcher is not None else FILE)
    started = time.perf_counter()
    with torch.no_grad():
        of_a, of_b = (states_of(encoder, [m], wiring)[0] for m in (a, b))
    element, costs = matched(of_a, of_b, wiring)
    reading = time.perf_counter() - started
    fixed, moving = float32(a), float32(b)
    found = Matching(wiring, fixed, moving, start=element)
    info: dict[str, Any] = {"found": found.objective / found.unit, "reading": reading}
    if not refine:
        return Found(element, costs, info)
    generator = torch.Generator().manual_seed(seed)
    sweeps = found.ascend(generator)
    as_it_is = Matching(wiring, fixed, moving)
    if as_it_is.objective > found.recount():
        as_it_is.ascend(generator)
        found = as_it_is
    found.recount()
    info |= {"sweeps": sweeps, "refining": time.perf_counter() - started - reading}
    return Found(found.permutation, {f: found.similarity(f) for f in found.factors}, info)


def states_of(encoder: ElementEncoder, models: Sequence[Mapping[str, Tensor]], wiring: Wiring) -> list[States]:
    """Per network and free factor the states of its elements, ``(*over, size, outputs)``."""
    items = [encoder.prepare(m, wiring) for m in models]
    return gathered(encoder(encoder.metanet.collate(items)), items, [wiring] * len(items))


def gathered(states: Tensor, items: Sequence[Item], wirings: Sequence[Wiring]) -> list[States]:
    """States of the nodes of a batch, sorted by network and factor; the mean over what else a cell's nodes are."""
    out, start = [], 0
    for item, wiring in zip(items, wirings, strict=True):
        rows = node_numbers(item.structure, wiring)
        out.append({f: states[index + start].mean(-2) for f, index in rows.items()})
        start += item.structure.num_nodes
    return out


def node_numbers(structure: Structure, wiring: Wiring) -> dict[str, Tensor]:
    """Of every free factor of two elements or more, the nodes that are its elements: ``(*over, size, nodes each)``."""
    key = f"nodes of factors {hash(tuple((c.start, c.factors) for c in structure.cells))}"
    known = wiring.shared.get(key)
    if isinstance(known, dict):
        return known
    found: dict[str, Tensor] = {}
    for name, factor in wiring.free.items():
        front = [*factor.over, name]
        cells = [c for c in structure.cells if set(front) <= set(c.factors)]
        if factor.size < 2 or not cells:
            continue
        parts = []
        # Cells that are this factor alone say the most of its elements; heads have none of their own.
        fewest = min(c.size for c in cells)
        for cell in (c for c in cells if c.size == fewest):
            order = [cell.factors.index(f) for f in front]
            rest = [i for i in range(len(cell.factors)) if i not in order]
            grid = (cell.start + torch.arange(cell.size)).reshape(cell.sizes).permute(*order, *rest)
            parts.append(grid.reshape(*grid.shape[: len(front)], -1))
        found[name] = torch.cat(parts, -1)
    wiring.shared[key] = found
    return found


def matched(of_a: States, of_b: States, wiring: Wiring) -> tuple[Permutation, dict[str, Tensor]]:
    """The permutations of greatest similarity of states, and the similarities ``(*over, n_a, n_b)`` after them.

    Heads are matched before the channels inside them are.
    """
    index: dict[str, Tensor] = {}
    costs: dict[str, Tensor] = {}
    for name in sorted(of_a, key=lambda n: len(wiring.free[n].over)):
        over = list(wiring.free[name].over)
        two = of_b[name]
        if over:
            two = two[tuple(Permutation(index, wiring.factors)._grid(over))]
        alike = similarity(of_a[name], two)
        index[name] = assign(alike)
        costs[name] = alike.gather(-1, index[name].unsqueeze(-2).expand(alike.shape))
    return Permutation(index, wiring.factors), costs


def similarity(one: Tensor, two: Tensor) -> Tensor:
    """Cosines of states ``(…, n, d)`` around the mean of each network's: ``(…, n, n)``."""
    one, two = (F.normalize(x - x.mean(-2, keepdim=True), dim=-1) for x in (one, two))
    return one @ two.transpose(-1, -2)


def graph_of(tensors: Mapping[str, Tensor], wiring: Wiring) -> ParameterGraph:
    """The graph of the floating-point tensors that take part in the function, in float32."""
    unused = set(wiring.untouched)
    kept = {
        n: tensors[n].detach().to(torch.float32)
        for n in wiring
        if n in tensors and n not in unused and tensors[n].is_floating_point() and tensors[n].numel()
    }
    return of_tensors(kept, wiring)


# -------------------------------------------------------------------- files


def save_matcher(encoder: ElementEncoder, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a matcher, weights as float16; ``facts`` go into the file's header."""
    from safetensors.torch import save

    kept = {n: t.detach().half().contiguous() for n, t in encoder.state_dict().items() if "readout" not in n}
    header = {"format": _FORMAT, "version": _VERSION, "config": encoder.config, "facts": dict(facts or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(kept, {"weightspace": json.dumps(header)}))


@lru_cache(maxsize=4)
def load_matcher(path: Path) -> ElementEncoder:
    """What ``save_matcher`` wrote. Raises ``AlignmentError`` for a file that is missing, damaged or another thing."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        tensors = load(data)
        facts = facts_of(data, _FORMAT, _VERSION)
        encoder = ElementEncoder(**facts["config"])
        wanted = {n for n in encoder.state_dict() if "readout" not in n}
        if wanted != set(tensors):
            raise ValueError("its tensors are not those of its configuration")
        encoder.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AlignmentError(
            f"{path} is no matcher ({' '.join(str(error).split())[:200]}); make one with "
            "`python -m weightspace.align.matcher_training`"
        ) from error
    return encoder.eval()


__all__ = [
    "ElementEncoder", "graph_of", "learned", "load_matcher", "matched", "save_matcher", "similarity", "states_of",
]  # fmt: skip
