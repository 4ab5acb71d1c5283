"""Sequence models around one ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``: optional embedding, optional linear head.

Cell type, depth and direction are read from the names and shapes (four, three or one gates). The head is
applied at every step. Assumed: a plain RNN uses tanh; no skip connections around the layers.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "recurrent"
PRIORITY = 80
_NAME = re.compile(r"(?P<module>.*\.)?(weight|bias)_(ih|hh)_l(?P<layer>\d+)(?P<reverse>_reverse)?$")
_GATES = {4: "LSTM", 3: "GRU", 1: "RNN"}


class _Cells(nn.Module):
    """The parameters of a recurrent layer under PyTorch's names, run step by step."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], gates: int, depth: int, both: bool) -> None:
        super().__init__()
        self.gates, self.depth, self.suffixes = gates, depth, ("", "_reverse") if both else ("",)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, time, in). Returns (batch, time, hidden x directions)."""
        for layer in range(self.depth):
            runs = []
            for suffix in self.suffixes:
                steps = list(x.unbind(1))
                out = self._run(steps[::-1] if suffix else steps, f"_l{layer}{suffix}")
                runs.append(torch.stack(out[::-1] if suffix else out, dim=1))
            x = torch.cat(runs, dim=-1) if len(runs) > 1 else runs[0]
        return x

    def _run(self, steps: list[Tensor], key: str) -> list[Tensor]:
        w_ih, w_hh = getattr(self, f"weight_ih{key}"), getattr(self, f"weight_hh{key}")
        b_ih, b_hh = getattr(self, f"bias_ih{key}", None), getattr(self, f"bias_hh{key}", None)
        h = c = steps[0].new_zeros(steps[0].shape[0], w_hh.shape[1])
        outputs = []
        for step in steps:
            a, b = F.linear(step, w_ih, b_ih), F.linear(h, w_hh, b_hh)
            if self.gates == 4:
                i, f, g, o = (a + b).chunk(4, dim=1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif self.gates == 3:
                (ra, za, na), (rb, zb, nb) = a.chunk(3, dim=1), b.chunk(3, dim=1)
                z = torch.sigmoid(za + zb)
                h = (1 - z) * torch.tanh(na + torch.sigmoid(ra + rb) * nb) + z * h
            else:
                h = torch.tanh(a + b)
            outputs.append(h)
        return outputs


class _Model(nn.Module):
    def __init__(self, embedding: tuple[int, ...] | None, cells: _Cells, heads: list[nn.Linear]) -> None:
        super().__init__()
        self.embedding = None if embedding is None else nn.Embedding(*embedding)
        self.cells = cells
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cells(x if self.embedding is None else self.embedding(x))
        for i, head in enumerate(self.heads):
            x = head(torch.relu(x) if i else x)
        return x


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise one recurrent module with linear layers after it; inputs ``(2, 3)`` steps."""
    shapes = signature.shapes
    cells: dict[str, tuple[int, ...]] = {}
    modules, rest, depth, both = set(), [], 0, False
    for name, shape in shapes.items():
        if match := _NAME.match(name):
            modules.add(match["module"] or "")
            cells[name[len(match["module"] or "") :]] = shape
            depth, both = max(depth, int(match["layer"]) + 1), both or bool(match["reverse"])
        else:
            rest.append(name)
    if len(modules) != 1 or any(len(s) != (2 if n.startswith("w") else 1) for n, s in cells.items()):
        return None
    directions = ("", "_reverse") if both else ("",)
    keys = [f"{side}_l{layer}{d}" for layer in range(depth) for d in directions for side in ("ih", "hh")]
    if {n for n in cells if n.startswith("w")} != {f"weight_{key}" for key in keys}:
        return None
    biased = {n for n in cells if n.startswith("b")}
    if biased not in (set(), {f"bias_{key}" for key in keys}):
        return None
    gates, remainder = divmod(cells["weight_hh_l0"][0], max(1, cells["weight_hh_l0"][1]))
    if remainder or gates not in _GATES:
        return None
    incoming, hidden = cells["weight_ih_l0"][1], cells["weight_hh_l0"][1]

    weights = [name for name in rest if name.endswith(".weight")]
    if any(len(shapes[name]) != 2 for name in weights):
        return None
    if set(rest) - set(weights) - {name[: -len("weight")] + "bias" for name in weights}:
        return None
    embeddings = [name for name in weights if re.search(r"emb|wte|encoder|lookup", name)]
    linears = [name for name in weights if name not in embeddings]
    if len(embeddings) > 1 or (embeddings and shapes[embeddings[0]][1] != incoming):
        return None
    if embeddings and embeddings[0].replace("weight", "bias") in shapes:
        return None
    width = hidden * len(directions)
    for name in linears:
        if shapes[name][1] != width:
            return None
        width = shapes[name][0]

    module_name = modules.pop()
    rename = {f"cells.{name}": module_name + name for name in cells}
    with torch.device("meta"):
        heads = []
        for i, name in enumerate(linears):
            bias = name[: -len("weight")] + "bias"
            heads.append(nn.Linear(shapes[name][1], shapes[name][0], bias=bias in shapes))
            rename |= (
                {f"heads.{i}.weight": name, f"heads.{i}.bias": bias}
                if bias in shapes
                else {f"heads.{i}.weight": name}
            )
        embedding = shapes[embeddings[0]] if embeddings else None
        module = _Model(embedding, _Cells(cells, gates, depth, both), heads)
    if embeddings:
        rename["embedding.weight"] = embeddings[0]
    inputs = torch.randint(embedding[0], (2, 3)) if embedding else torch.randn(2, 3, incoming)
    kind = ("bidirectional " if both else "") + _GATES[gates]
    sizes = [incoming, hidden * len(directions), *(shapes[name][0] for name in linears)]
    guess = "" if len(set(sizes)) == len(sizes) else "parts of equal width may be parallel or joined by skips"
    name = f"{kind}, {depth} layers of {hidden}"
    return ws.Skeleton(module.eval(), (inputs,), name, rename=rename, guess=guess)
