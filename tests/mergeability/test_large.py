"""Networks too large to be run: maps inside heads are found with a small twin and undone layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightspace as ws
from weightspace.mergeability import protection
from weightspace.mergeability.preflight import preflight
from weightspace.wiring import transformers as wired
from weightspace.wiring.proof import distance, run

transformers = pytest.importorskip("transformers")
Folders = dict[str, Path]


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=48, n_head=4, vocab_size=67, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=67, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def saved(build: Any, folder: Path) -> Folders:
    """A base, two ordinary children of it, and the second one protected."""
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(folder / "base")
    base = {n: t.clone() for n, t in model.state_dict().items()}
    wiring = ws.wiring(folder / "base")
    for k, name in enumerate(("one", "two", "hidden")):
        generator = torch.Generator().manual_seed(min(k, 1))
        tuned = {n: t + 0.1 * float(t.std()) * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t
                 for n, t in base.items()}  # fmt: skip
        if name == "hidden":
            held = {n: tuned[n] for n in wiring.layouts if n in tuned}
            tuned |= protection.protect(held, wiring, seed=5, kinds=["maps"])
        model.load_state_dict(tuned)
        model.tie_weights()
        model.save_pretrained(folder / name)
    return {n: folder / n for n in ("base", "one", "two", "hidden")}


@pytest.mark.parametrize("build", [gpt2, llama])
def test_maps_inside_heads_are_found_and_undone_without_running_the_network(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = saved(build, tmp_path)
    small = ws.wiring(folders["base"])
    assert small.program is not None
    monkeypatch.setattr(wired, "RUNNABLE", 1000)
    monkeypatch.setattr(wired, "prove_on_twin", lambda found, *rest: found.with_(status="proved"))
    checks = ["values", "ancestry", "protection"]
    flight = preflight([folders[n] for n in ("one", "two", "hidden")], folders["base"], checks=checks)
    assert [p.protected for p in flight.protection] == [False, False, True]
    assert set(flight.undone) == {"hidden"}
    assert "maps" in flight.of(check="protection")[0].sentence
    assert "maps inside heads were sought" in " ".join(flight.skipped.values())
    two, hidden = (ws.open(folders[n]) for n in ("two", "hidden"))
    undone: dict[str, Tensor] = dict(flight.undone["hidden"])
    matrices = [n for n in two if two[n].dim() > 1]
    far, near = (max(float((x[n] - two[n]).norm() / two[n].norm()) for n in matrices) for x in (hidden, undone))
    assert far > 0.3
    assert near < 0.25
    outs = [run(small.program, {**small.program.tensors, **dict(x)}, torch.float32) for x in (hidden, undone)]
    assert distance(*outs) < 1e-4
