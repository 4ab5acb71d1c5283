"""Transformers and their relatives written out by hand, and graph networks from PyG."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import Built, attention, axes, case, inside, times

WIDTH, HEADS, DIM, HIDDEN, VOCABULARY = 32, 4, 8, 64, 50


def words(length: int = 7) -> Tensor:
    """Two random sentences."""
    return torch.randint(1, VOCABULARY, (2, length))


class TorchEncoder(nn.Module):
    """torch.nn's own encoder, whose queries, keys and values come out of one matrix."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(16, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.position[: x.shape[1]]
        return self.head(self.encoder(x).mean(1))


LAYER = attention(HEADS, DIM) + axes(HIDDEN)


@case("torch-encoder", axes(WIDTH) + times(2, LAYER))
def torch_encoder() -> Built:
    return TorchEncoder(False), (words(),), {}


@case("torch-encoder-prenorm", axes(WIDTH) + times(2, LAYER))
def torch_encoder_prenorm() -> Built:
    return TorchEncoder(True), (words(),), {}


# Encoder and decoder have streams of their own, which meet in the keys and values of the cross
# attention only. The output is projected to the vocabulary by a matrix of its own.
@case("torch-transformer", axes(WIDTH, WIDTH) + LAYER + times(2, attention(HEADS, DIM)) + axes(HIDDEN))
def torch_transformer() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
            self.body = nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, batch_first=True)
            self.head = nn.Linear(WIDTH, VOCABULARY)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.head(self.body(self.source(source), self.target(target), tgt_mask=mask))

    return Net(), (words(6), words(5)), {}


class FusedAttention(nn.Module):
    """Attention whose fused projection is reshaped to (3, heads, channels), as in most ViT code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * DIM**-0.5) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH))


class ViT(nn.Module):
    """Patches, class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.attentions = nn.ModuleList(FusedAttention() for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for index in range(2):
            x = x + self.attentions[index](self.norms[2 * index](x))
            x = x + self.mlps[index](self.norms[2 * index + 1](x))
        return self.head(self.norms[4](x)[:, 0])


@case("vit", axes(WIDTH) + times(2, LAYER))
def vit() -> Built:
    return ViT(), (torch.randn(2, 3, 16, 16),), {}


class GPT(nn.Module):
    """Causal transformer whose output matrix is the embedding (tied)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape
        x = self.tokens(x) + self.positions(torch.arange(length))
        for index in range(2):
            qkv = self.qkv[index](self.norms[2 * index](x)).split(WIDTH, dim=-1)
            q, k, v = (part.view(batch, length, HEADS, DIM).transpose(1, 2) for part in qkv)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj[index](y.transpose(1, 2).contiguous().view(batch, length, WIDTH))
            x = x + self.down[index](F.gelu(self.up[index](self.norms[2 * index + 1](x)), approximate="tanh"))
        return self.head(self.norms[4](x))


@case("gpt-tied", axes(WIDTH) + times(2, LAYER))
def gpt_tied() -> Built:
    return GPT(), (words(),), {}


class RMSNorm(nn.Module):
    """Root mean square normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, channel i paired with channel i + half."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), 10.0 ** -torch.arange(half))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Llama(nn.Module):
    """Rotary positions, two key heads for four query heads, RMS norm, SwiGLU."""

    def __init__(self, kv: int = 2) -> None:
        super().__init__()
        self.kv = kv
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": RMSNorm(WIDTH),
                    "q": nn.Linear(WIDTH, WIDTH, bias=False),
                    "k": nn.Linear(WIDTH, kv * DIM, bias=False),
                    "v": nn.Linear(WIDTH, kv * DIM, bias=False),
                    "o": nn.Linear(WIDTH, WIDTH, bias=False),
                    "norm2": RMSNorm(WIDTH),
                    "gate": nn.Linear(WIDTH, HIDDEN, bias=False),
                    "up": nn.Linear(WIDTH, HIDDEN, bias=False),
                    "down": nn.Linear(HIDDEN, WIDTH, bias=False),
                }
            )
            for _ in range(2)
        )
        self.norm = RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape
        x = self.tokens(x)
        mask = torch.full((length, length), float("-inf")).triu(1)
        for layer in self.layers:
            y = layer["norm1"](x)
            q = rotate(layer["q"](y).view(batch, length, HEADS, DIM).transpose(1, 2))
            k = rotate(layer["k"](y).view(batch, length, self.kv, DIM).transpose(1, 2))
            v = layer["v"](y).view(batch, length, self.kv, DIM).transpose(1, 2)
            k, v = (t.repeat_interleave(HEADS // self.kv, dim=1) for t in (k, v))
            scores = torch.matmul(q, k.transpose(2, 3)) / DIM**0.5 + mask
            y = torch.matmul(scores.softmax(-1), v).transpose(1, 2).reshape(batch, length, WIDTH)
            x = x + layer["o"](y)
            y = layer["norm2"](x)
            x = x + layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        return self.head(self.norm(x))


@case("llama-gqa", axes(WIDTH) + times(2, attention(HEADS, DIM, kv=2, rotary=DIM) + axes(HIDDEN)))
def llama_gqa() -> Built:
    return Llama(2), (words(),), {}


# One key head for all: its value channels are a plain axis, common to the four query heads.
@case("llama-mqa", axes(WIDTH) + times(2, attention(HEADS, DIM, kv=1, rotary=DIM) + axes(HIDDEN)))
def llama_mqa() -> Built:
    return Llama(1), (words(),), {}


class MixtureOfExperts(nn.Module):
    """Each token goes to the two best of four experts, which are slices of two tensors."""

    def __init__(self, experts: int = 4, hidden: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(10, WIDTH)
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, hidden) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, WIDTH) / hidden**0.5)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        best, index = self.router(x).softmax(-1).topk(2, dim=-1)
        best = best / best.sum(-1, keepdim=True)
        weight = torch.zeros(len(x), self.up.shape[0]).scatter(1, index, best)
        hidden = F.gelu(torch.einsum("nd,edh->neh", x, self.up) + self.bias)
        return self.head(x + torch.einsum("neh,ehd,ne->nd", hidden, self.down, weight))


# Experts move as wholes with the rows of the router, and the hidden units inside each expert.
@case("moe-top2", axes(WIDTH, 4) + inside(24, 4))
def moe_top2() -> Built:
    return MixtureOfExperts(), (torch.randn(5, 10),), {}


class SoftMixture(nn.Module):
    """All experts weighted by a softmax; each is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, WIDTH)
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, WIDTH)) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weight = self.router(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return self.head(x + (weight[..., None] * outputs).sum(1))


# The experts are separate tensors: to swap them is no permutation of an axis, which pins the router's rows.
@case("moe-soft-modules", axes(WIDTH) + times(3, axes(24)))
def moe_soft_modules() -> Built:
    return SoftMixture(), (torch.randn(5, 10),), {}


class Mamba(nn.Module):
    """A selective state-space block (Gu & Dao 2023), scanned step by step."""

    def __init__(self, width: int = 16, inner: int = 32, state: int = 4, rank: int = 3) -> None:
        super().__init__()
        self.state, self.rank = state, rank
        self.norm = RMSNorm(width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.a_log = nn.Parameter(torch.log(torch.arange(1, state + 1.0)).repeat(inner, 1))
        self.d = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, gate = self.in_proj(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length].transpose(1, 2))
        dt, b, c = self.x_proj(u).split([self.rank, self.state, self.state], -1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(dt[..., None] * -torch.exp(self.a_log))  # (batch, length, inner, state)
        drive = dt[..., None] * b[:, :, None] * u[..., None]
        h = torch.zeros_like(drive[:, 0])
        outputs = []
        for step in range(length):
            h = decay[:, step] * h + drive[:, step]
            outputs.append((h * c[:, step, None]).sum(-1))
        y = torch.stack(outputs, 1) + u * self.d
        return x + self.out_proj(y * F.silu(gate))


# Free: the stream, and per block the inner channels, the rank of the step size, and the state, whose
# elements meet in the dot product with c. Each inner channel decays its states at rates of its own,
# but b and c are common to the channels, so the state has one permutation for all.
@case("mamba", axes(16) + times(2, axes(32, 4, 3)))
def mamba() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
            self.blocks = nn.Sequential(Mamba(), Mamba())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.embedding(x)))

    return Net(), (words(6),), {}


class LinearAttention(nn.Module):
    """Attention without softmax: keys and values are summed first (Katharopoulos et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, HEADS, DIM) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.einsum("blhc,blhd->bhcd", k, v)
        scale = 1 / torch.einsum("blhc,bhc->blh", q, k.sum(1))
        y = torch.einsum("blhc,bhcd,blh->blhd", q, memory, scale)
        return self.head(x + self.o(y.reshape(batch, length, WIDTH)))


@case("linear-attention", axes(WIDTH) + attention(HEADS, DIM))
def linear_attention() -> Built:
    return LinearAttention(), (torch.randn(2, 5, 6),), {}


class CrossAttention(nn.Module):
    """Learned queries read an encoded sequence (a Perceiver in small) through nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 20))
        self.queries = nn.Parameter(torch.randn(3, WIDTH))
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, kdim=20, vdim=20, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encode(x)
        queries = self.queries.expand(len(x), -1, -1)
        y, _ = self.attend(queries, memory, memory, need_weights=False)
        return self.head((queries + y).mean(1))


# The three learned queries are averaged, but nothing tells them apart: they may be permuted as well.
@case("cross-attention", axes(24, 20, WIDTH, 3) + attention(HEADS, DIM))
def cross_attention() -> Built:
    return CrossAttention(), (torch.randn(2, 5, 6),), {}


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021): one MLP across patches, one across channels."""

    def __init__(self, width: int = 16, patches: int = 9, across: int = 12, along: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.token = nn.ModuleList(self.mlp(patches, across) for _ in range(2))
        self.channel = nn.ModuleList(self.mlp(width, along) for _ in range(2))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def mlp(width: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for index in range(2):
            y = self.norms[2 * index](x).transpose(1, 2)
            x = x + self.token[index](y).transpose(1, 2)
            x = x + self.channel[index](self.norms[2 * index + 1](x))
        return self.head(self.norms[4](x).mean(1))


# The patches are places of the input: pinned.
@case("mlp-mixer", axes(16) + times(2, axes(12, 32)))
def mlp_mixer() -> Built:
    return Mixer(), (torch.randn(2, 3, 12, 12),), {}


# Graph networks -----------------------------------------------------------------------------------


def graph() -> tuple[Tensor, Tensor]:
    """Node features and edges of a ring of six with two chords."""
    source = torch.arange(6)
    ring = torch.stack([source, (source + 1) % 6])
    chords = torch.tensor([[0, 1], [3, 4]])
    edges = torch.cat([ring, ring.flip(0), chords], 1)
    return torch.randn(6, 7), edges


@case("pyg-gcn", axes(16, 16), group="pyg")
def pyg_gcn() -> Built:
    from torch_geometric.nn import GCN

    return GCN(7, 16, 3, out_channels=4), graph(), {}


@case("pyg-sage", axes(16, 16), group="pyg")
def pyg_sage() -> Built:
    from torch_geometric.nn import GraphSAGE

    return GraphSAGE(7, 16, 3, out_channels=4), graph(), {}


# GAT's hidden axis is heads × channels, concatenated. The last layer averages its heads over the
# classes: there the heads move and the channels, being the output, do not.
@case("pyg-gat", axes(4) + inside(8, 4) + axes(2), group="pyg")
def pyg_gat() -> Built:
    from torch_geometric.nn import GATConv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GATConv(7, 8, heads=4), GATConv(32, 5, heads=2, concat=False)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.second(F.elu(self.first(x, edges)), edges)

    return Net(), graph(), {}


# Each layer's MLP has a hidden axis (as wide as its output) and an output axis; the last output is pinned.
@case("pyg-gin", axes(16, 16, 4), group="pyg")
def pyg_gin() -> Built:
    from torch_geometric.nn import GIN

    return GIN(7, 16, 2, out_channels=4, norm="batch_norm"), graph(), {}
