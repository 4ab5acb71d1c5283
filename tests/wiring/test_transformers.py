"""Hugging Face configs and folders: traced without weights, proved on a small twin, never remote code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weightspace as ws
from weightspace.errors import WiringError

transformers = pytest.importorskip("transformers")


def test_a_large_config_is_proved_on_a_small_twin() -> None:
    wiring = ws.wiring(transformers.GPT2Config())
    assert wiring.proved
    assert wiring.proof is not None
    assert "small twin" in wiring.proof.on
    assert wiring.shapes["transformer.wte.weight"] == (50257, 768)
    assert wiring["transformer.wte.weight"] == wiring["lm_head.weight"]
    sizes = {f.size for f in wiring.free.values()}
    assert {768, 12, 64, 3072} <= sizes
    assert wiring.movable_share > 0.99


def test_a_saved_folder_is_wired_in_its_own_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = ws.open(tmp_path)
    wiring = ws.wiring(checkpoint)
    assert wiring.proved
    assert wiring.origin == "transformers:llama"
    assert set(checkpoint) <= set(wiring)
    p = wiring.random(3)
    moved = wiring.apply(p, dict(checkpoint))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        before = model(ids).logits
        model.load_state_dict(moved, strict=False)
        after = model(ids).logits
    assert torch.allclose(before, after, atol=1e-5)
    assert not torch.equal(moved["model.layers.0.mlp.up_proj.weight"], checkpoint["model.layers.0.mlp.up_proj.weight"])


def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "intermediate_size": 56}))
    with pytest.raises(WiringError, match=r"do not fit config\.json.*the config makes it"):
        ws.wiring(tmp_path)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(7, 5)}, tmp_path / "model.safetensors")
    marker = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoModel": "modeling_evil.Evil"}, "architectures": ["Evil"]})
    )
    with pytest.raises(WiringError, match="remote code is never run"):
        ws.wiring(tmp_path)
    assert not marker.exists()
