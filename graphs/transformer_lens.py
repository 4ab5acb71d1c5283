"""Transformers with the names of TransformerLens: one tensor per head and role, ``W_Q`` (heads, model, head).

Pre-norm blocks, learned positions, optional MLP (gated or not), LayerNorm with weights, RMS norm, or norms
folded into their neighbours. Heads are read from the shapes. Not in the shapes: whether attention looks
ahead. The default is causal, as in the library; nets with MLPs and at most two outputs are taken as
bidirectional with ReLU (ARENA's bracket classifier, read at its first position, is one; its attention-only
palindrome classifiers are causal and read at the last). Neither the mask nor the activation touches an axis
of a weight. Rotary positions leave no tensor, so that nets without ``pos_embed`` are declined.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightspace as ws

FAMILY = "transformer-lens"
_NAME = re.compile(
    r"(embed\.W_E|pos_embed\.W_pos|ln_final\.[wb]|unembed\.(W_U|b_U)"
    r"|blocks\.\d+\.(ln[12]\.[wb]|attn\.([Wb]_[QKVO]|mask|IGNORE)|mlp\.(W_in|W_gate|W_out|b_in|b_out)))$"
)


class _Tensors(nn.Module):
    """A bag of parameters under one prefix."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class _Norm(_Tensors):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "b"):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.w
        return F.layer_norm(x, x.shape[-1:], self.w, self.b, eps=1e-5)


class _Attention(_Tensors):
    causal = False

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, position, model)."""
        x = x.unsqueeze(1)  # (batch, 1, position, model) against (heads, model, head)
        q = x @ self.W_Q + self.b_Q[:, None]
        k = x @ self.W_K + self.b_K[:, None]
        v = x @ self.W_V + self.b_V[:, None]
        scores = q @ k.transpose(-1, -2) / self.W_Q.shape[-1] ** 0.5
        if self.causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(ahead, -torch.inf)
        return (scores.softmax(-1) @ v @ self.W_O).sum(1) + self.b_O


class _MLP(_Tensors):
    relu = False

    def forward(self, x: Tensor) -> Tensor:
        activation = F.relu if self.relu else F.gelu
        if hasattr(self, "W_gate"):
            return (activation(x @ self.W_gate) * (x @ self.W_in + self.b_in)) @ self.W_out + self.b_out
        return activation(x @ self.W_in + self.b_in) @ self.W_out + self.b_out


class _Block(nn.Module):
    def __init__(self, parts: dict[str, dict[str, tuple[int, ...]]], causal: bool) -> None:
        super().__init__()
        self.attn = _Attention(parts["attn"])
        self.attn.causal = causal
        self.ln1 = _Norm(parts["ln1"]) if "ln1" in parts else None
        self.ln2 = _Norm(parts["ln2"]) if "ln2" in parts else None
        self.mlp = _MLP(parts["mlp"]) if "mlp" in parts else None
        if self.mlp is not None:
            self.mlp.relu = not causal

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(_normed(x, self.ln1))
        if self.mlp is not None:
            x = x + self.mlp(_normed(x, self.ln2))
        return x


class _Transformer(nn.Module):
    def __init__(self, parts: dict[str, dict[str, tuple[int, ...]]], blocks: list[_Block]) -> None:
        super().__init__()
        self.embed = _Tensors(parts["embed"])
        self.pos_embed = _Tensors(parts["pos_embed"])
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = _Norm(parts["ln_final"]) if "ln_final" in parts else None
        self.unembed = _Tensors(parts["unembed"])

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens``: (batch, position). Returns logits (batch, position, output)."""
        x = F.embedding(tokens, self.embed.W_E) + self.pos_embed.W_pos[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return _normed(x, self.ln_final) @ self.unembed.W_U + self.unembed.b_U


def _normed(x: Tensor, norm: _Norm | None) -> Tensor:
    """Norms whose weights were folded away still centre and scale."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) if norm is None else norm(x)


def build(signature: ws.Signature) -> ws.Skeleton | None:
    """Recognise a TransformerLens net; inputs ``(2, up to 8)`` tokens."""
    shapes = signature.shapes
    needed = {"embed.W_E": 2, "pos_embed.W_pos": 2, "unembed.W_U": 2, "blocks.0.attn.W_Q": 3}
    if any(len(shapes.get(name, ())) != rank for name, rank in needed.items()):
        return None
    if not all(_NAME.match(name) for name in shapes):
        return None
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    unused = tuple(name for name in shapes if name.endswith((".mask", ".IGNORE")))
    for name, shape in shapes.items():
        if name not in unused:
            prefix, leaf = name.rsplit(".", 1)
            parts.setdefault(prefix, {})[leaf] = shape
    depth = 1 + max(int(name.split(".")[1]) for name in parts if name.startswith("blocks."))
    if not _complete(parts, depth):
        return None
    causal = shapes["unembed.W_U"][1] > 2 or "blocks.0.mlp" not in parts
    with torch.device("meta"):
        blocks = []
        for i in range(depth):
            own = {
                name.split(".")[2]: part for name, part in parts.items() if name.startswith(f"blocks.{i}.")
            }
            blocks.append(_Block(own, causal))
        module = _Transformer(parts, blocks)
    heads, kind = shapes["blocks.0.attn.W_Q"][0], "causal" if causal else "bidirectional"
    length = min(8, shapes["pos_embed.W_pos"][0])
    tokens = torch.randint(shapes["embed.W_E"][0], (2, length))
    name = f"TransformerLens, {depth} blocks of {heads} heads, {kind}"
    return ws.Skeleton(module.eval(), (tokens,), name, unused=unused)


def _complete(parts: dict[str, dict[str, tuple[int, ...]]], depth: int) -> bool:
    """Whether every block is whole and all sizes agree."""
    vocabulary, model = parts["embed"]["W_E"]
    heads, _, head = parts["blocks.0.attn"]["W_Q"]
    want: dict[str, dict[str, tuple[int, ...]]] = {
        "embed": {"W_E": (vocabulary, model)},
        "pos_embed": {"W_pos": (parts["pos_embed"]["W_pos"][0], model)},
        "unembed": {"W_U": (model, parts["unembed"]["W_U"][1]), "b_U": (parts["unembed"]["W_U"][1],)},
    }
    for i in range(depth):
        attention: dict[str, tuple[int, ...]] = {f"W_{role}": (heads, model, head) for role in "QKV"}
        attention |= {f"b_{role}": (heads, head) for role in "QKV"}
        want[f"blocks.{i}.attn"] = {**attention, "W_O": (heads, head, model), "b_O": (model,)}
        if mlp := parts.get(f"blocks.{i}.mlp"):
            width = next(iter(mlp.get("b_in", (0,))), 0)
            maps = {name: (model, width) for name in ("W_in", "W_gate") if name in mlp}
            want[f"blocks.{i}.mlp"] = {**maps, "b_in": (width,), "W_out": (width, model), "b_out": (model,)}
            if "W_in" not in mlp:
                return False
    norms = [name for name in parts if re.search(r"(ln[12]|ln_final)$", name)]
    biased = any("b" in parts[name] for name in norms)
    for name in norms:
        want[name] = {"w": (model,), "b": (model,)} if biased else {"w": (model,)}
    return parts == want
