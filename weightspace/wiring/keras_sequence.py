"""Keras layers over sequences in torch: recurrent layers, wrappers and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightspace.wiring.keras_layers import Call, activate, layer


@layer("LSTM", "GRU", "SimpleRNN", "CuDNNLSTM", "CuDNNGRU")
def _recurrent(call: Call, x: Any, initial_state: Any = None, **unused: Any) -> Any:
    """Kernel: (in, gates x units), recurrent kernel: (units, gates x units), gates i f c o or z r h."""
    part = "cell/" if not call.kind.startswith("CuDNN") else ""
    kernel, recurrent = call.need(part + "kernel"), call.need(part + "recurrent_kernel")
    return _unrolled(call, call.kind, x, kernel, recurrent, call.weight(part + "bias"), initial_state)


@layer("RNN")
def _rnn(call: Call, x: Any, initial_state: Any = None, **unused: Any) -> Any:
    kind, config = call.wrapped["cell"]
    if kind not in ("LSTMCell", "GRUCell", "SimpleRNNCell"):
        raise call.refuse(f"a cell of class {kind!r}")
    kernel, recurrent, bias = call.inside("cell")
    merged = Call(call.name, call.kind, {**config, **call.config}, call.weight, call.inside, {}, call.major)
    return _unrolled(merged, kind.removesuffix("Cell"), x, kernel, recurrent, bias, initial_state)


@layer("LSTMCell", "GRUCell", "SimpleRNNCell")
def _cell_weights(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    return call.need("kernel"), call.need("recurrent_kernel"), call.weight("bias")


def _unrolled(call: Call, kind: str, x: Any, kernel: Tensor, recurrent: Tensor, bias: Tensor | None, state: Any) -> Any:
    """Steps through ``x``: (batch, time, in); state: (batch, units) each."""
    if call.config.get("time_major"):
        raise call.refuse("time_major")
    if isinstance(x, (list, tuple)):
        x, state = x[0], list(x[1:])
    if isinstance(state, Tensor):
        state = [state]
    units = recurrent.shape[0]
    h = x.new_zeros(x.shape[0], units) if not state else state[0]
    c = x.new_zeros(x.shape[0], units) if not state or len(state) < 2 else state[1]
    fused = kind.startswith("CuDNN")
    kind = kind.removeprefix("CuDNN")
    inner = "sigmoid" if fused else call.get("recurrent_activation", "inner_activation", default="sigmoid")
    outer = "tanh" if fused else call.config.get("activation", "tanh")
    own, back = bias, None
    if bias is not None and fused:  # input and recurrent bias in one vector
        own, back = bias.chunk(2)
    elif bias is not None and bias.ndim == 2:
        own, back = bias.unbind(0)
    reset_after = kind == "GRU" and (back is not None or bool(call.config.get("reset_after", fused)))
    inputs = x @ kernel if own is None else x @ kernel + own
    steps: list[Tensor] = []
    order = range(x.shape[1])
    for t in reversed(order) if call.config.get("go_backwards") else order:
        now = inputs.select(1, t)
        if kind == "GRU":
            h = _gru(call, now, h, recurrent, back, inner, outer, reset_after)
        elif kind == "LSTM":
            total = now + h @ recurrent if back is None else now + h @ recurrent + back
            i, forget, new, out = total.chunk(4, -1)
            c = activate(call, forget, inner) * c + activate(call, i, inner) * activate(call, new, outer)
            h = activate(call, out, inner) * activate(call, c, outer)
        else:
            h = activate(call, now + h @ recurrent, outer)
        steps.append(h)
    y = torch.stack(steps, 1) if call.config.get("return_sequences") else h
    if not call.config.get("return_state"):
        return y
    return [y, h, c] if kind == "LSTM" else [y, h]


def _gru(
    call: Call,
    x: Tensor,
    h: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    inner: Any,
    outer: Any,
    after: bool,
) -> Tensor:
    xz, xr, xh = x.chunk(3, -1)
    if after:
        back = h @ recurrent if bias is None else h @ recurrent + bias
        hz, hr, hh = back.chunk(3, -1)
        z, r = activate(call, xz + hz, inner), activate(call, xr + hr, inner)
        new = activate(call, xh + r * hh, outer)
    else:
        uz, ur, uh = recurrent.chunk(3, -1)
        z, r = activate(call, xz + h @ uz, inner), activate(call, xr + h @ ur, inner)
        new = activate(call, xh + (r * h) @ uh, outer)
    return z * h + (1 - z) * new


@layer("Bidirectional")
def _bidirectional(call: Call, x: Any, **unused: Any) -> Any:
    config, reverse = call.wrapped["forward"][1], call.wrapped["backward"][1]
    if config.get("return_state"):
        raise call.refuse("return_state")
    # Older files describe one layer for both directions, newer ones say of the second that it goes backwards.
    said = bool(reverse.get("go_backwards")) != bool(config.get("go_backwards"))
    forward, backward = call.inside("forward", x), call.inside("backward", x if said else x.flip(1))
    if config.get("return_sequences"):
        backward = backward.flip(1)
    mode = call.config.get("merge_mode", "concat")
    if mode == "concat":
        return torch.cat([forward, backward], -1)
    if mode in ("sum", "ave"):
        return forward + backward if mode == "sum" else (forward + backward) / 2
    return forward * backward if mode == "mul" else [forward, backward]


@layer("TimeDistributed")
def _time_distributed(call: Call, x: Tensor, **unused: Any) -> Tensor:
    if call.wrapped["layer"][0] in ("Dense", "Activation", "Dropout"):  # these work on the last axis anyway
        return call.inside("layer", x)  # type: ignore[no-any-return]
    y = call.inside("layer", x.flatten(0, 1))
    return y.unflatten(0, (x.shape[0], x.shape[1]))  # type: ignore[no-any-return]


@layer("MultiHeadAttention")
def _multi_head_attention(
    call: Call,
    query: Any,
    value: Tensor | None = None,
    key: Tensor | None = None,
    attention_mask: Tensor | None = None,
    use_causal_mask: bool = False,
    **settings: Any,
) -> Tensor:
    """Query, key, value kernels: (in, heads, dim), output kernel: (heads, dim, out)."""
    if isinstance(query, (list, tuple)):
        query, value, *rest = query
        key = rest[0] if rest else None
    value = query if value is None else value
    if (
        query.ndim != 3
        or settings.get("return_attention_scores")
        or call.config.get("attention_axes") not in (None, [1], 1)
    ):
        raise call.refuse("attention over other axes than time, or returning scores")
    q = _projected(call, "query", query)
    k = _projected(call, "key", value if key is None else key)
    v = _projected(call, "value", value)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    hidden = None if attention_mask is None else ~attention_mask.bool().unsqueeze(1)
    if use_causal_mask:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        hidden = later if hidden is None else hidden | later
    if hidden is not None:
        scores = scores.masked_fill(hidden, -1e9)
    mixed = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v)
    bias = call.weight("attention_output/bias")
    y = torch.einsum("bqhd,hdo->bqo", mixed, call.need("attention_output/kernel"))
    return y if bias is None else y + bias


def _projected(call: Call, part: str, x: Tensor) -> Tensor:
    bias = call.weight(f"{part}/bias")
    y = torch.einsum("bti,ihd->bthd", x, call.need(f"{part}/kernel"))
    return y if bias is None else y + bias


@layer("Attention")
def _attention(call: Call, xs: Sequence[Tensor], **settings: Any) -> Tensor:
    if call.config.get("use_scale") or call.config.get("score_mode", "dot") != "dot" or settings.get("use_causal_mask"):
        raise call.refuse("scaled, concatenated or causal scores")
    query, value = xs[0], xs[1]
    key = xs[2] if len(xs) > 2 else value
    return torch.softmax(query @ key.transpose(1, 2), -1) @ value
