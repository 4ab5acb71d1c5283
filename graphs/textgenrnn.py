"""textgenrnn character models (Keras weights): embedding, stacked LSTMs, attention-weighted average, softmax.

The embedding and the output of every LSTM are concatenated and averaged over time with attention weights.
The files come from Keras' CuDNN layer, which shows in biases of eight times the hidden size. Its kernels
are kept (in, gates x hidden) but each gate's memory reads as a (hidden, in) matrix, row by row. Where the
two sizes differ (the first layer), a permutation of the hidden units is therefore not one of the array's
own axes, and neither is one of the embedding; both stay pinned. Plain LSTM files, with biases of four times
the hidden size, have no such twist.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

import weightspace as ws

FAMILY = "textgenrnn"
_NAME = re.compile(r"(?P<layer>embedding|rnn_\d+|attention|output)(_\d+)?/(?:.*/)?(?P<leaf>[^/]+?)(:0)?$")


class _LSTM(nn.Module):
    """One Keras LSTM layer, parameters as the file lays them out; gates input, forget, cell, output."""

    def __init__(self, kernel: tuple[int, ...], hidden: int, bias: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.cudnn = bias == 8 * hidden
        self.kernel = nn.Parameter(torch.empty(kernel))
        self.recurrent_kernel = nn.Parameter(torch.empty(hidden, 4 * hidden))
        self.bias = nn.Parameter(torch.empty(bias))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, time, in). Returns (batch, time, hidden)."""
        incoming, n = x.shape[-1], self.hidden
        if self.cudnn:
            kernel = [gate.reshape(n, incoming).T for gate in self.kernel.chunk(4, dim=1)]
            recurrent = [gate.T for gate in self.recurrent_kernel.chunk(4, dim=1)]
            bias = self.bias.reshape(2, 4, n).sum(0)
        else:
            kernel = list(self.kernel.chunk(4, dim=1))
            recurrent = list(self.recurrent_kernel.chunk(4, dim=1))
            bias = self.bias.reshape(4, n)
        h = c = x.new_zeros(x.shape[0], n)
        states = []
        for step in x.unbind(1):
            i, f, g, o = (step @ k + h @ r + b for k, r, b in zip(kernel, recurrent, bias, strict=True))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, dim=1)


class _TextGen(nn.Module):
    def __init__(self, embedding: tuple[int, ...], rnns: list[_LSTM], classes: int) -> None:
        super().__init__()
        width = embedding[1] + sum(rnn.hidden for rnn in rnns)
        self.embeddings = nn.Parameter(torch.empty(embedding))
        self.rnn = nn.ModuleList(rnns)
        self.attention = nn.Parameter(torch.empty(width, 1))
        self.kernel = nn.Parameter(torch.empty(width, classes))
        self.bias = nn.Parameter(torch.empty(classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens``: (batch, time). Returns the next character's probabilities (batch, vocabulary)."""
        x = nn.functional.embedding(tokens, self.embeddings)
        seen = [x]
        for rnn in self.rnn:
            x = rnn(x)
            seen.append(x)
        joined = torch.cat(seen, dim=-1)
        weights = (joined @ self.attention).softmax(dim=1)
        return ((joined * weights).sum(dim=1) @ self.kernel + self.bias).softmax(dim=-1)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise textgenrnn; inputs ``(2, 4)`` characters."""
    shapes = signature.shapes
    names: dict[tuple[str, str], str] = {}
    for name in shapes:
        if not (match := _NAME.match(name)):
            return None
        leaf = "W" if match["leaf"].endswith("_W") else match["leaf"]
        names[match["layer"], leaf] = name
    depth = sum(layer.startswith("rnn_") and leaf == "kernel" for layer, leaf in names)
    want = {
        ("embedding", "embeddings"): 2,
        ("attention", "W"): 2,
        ("output", "kernel"): 2,
        ("output", "bias"): 1,
    }
    for i in range(1, depth + 1):
        want |= {(f"rnn_{i}", "kernel"): 2, (f"rnn_{i}", "recurrent_kernel"): 2, (f"rnn_{i}", "bias"): 1}
    if not depth or {key: len(shapes[name]) for key, name in names.items()} != want:
        return None
    rnns = []
    rename = {
        "embeddings": names["embedding", "embeddings"],
        "attention": names["attention", "W"],
        "kernel": names["output", "kernel"],
        "bias": names["output", "bias"],
    }
    with torch.device("meta"):
        for i in range(1, depth + 1):
            hidden, bias = (
                shapes[names[f"rnn_{i}", "recurrent_kernel"]][0],
                shapes[names[f"rnn_{i}", "bias"]][0],
            )
            kernel = shapes[names[f"rnn_{i}", "kernel"]]
            if bias not in (4 * hidden, 8 * hidden) or kernel[1] != 4 * hidden:
                return None
            rnns.append(_LSTM(kernel, hidden, bias))
            for leaf in ("kernel", "recurrent_kernel", "bias"):
                rename[f"rnn.{i - 1}.{leaf}"] = names[f"rnn_{i}", leaf]
        module = _TextGen(shapes[rename["embeddings"]], rnns, shapes[rename["kernel"]][1])
    tokens = torch.randint(shapes[rename["embeddings"]][0], (2, 4))
    layout = ", CuDNN layout" if rnns[0].cudnn else ""
    return ws.Skeleton(module.eval(), (tokens,), f"textgenrnn, {depth} LSTM layers{layout}", rename=rename)
