"""The graph of a network of a billion parameters, from a file that takes no room: its data are a hole."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
WORK = """
import json, sys, threading, time
peak = 0
def watch():
    global peak
    while True:
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak = max(peak, int(lines["RssAnon"].split()[0]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
from weightspace.explorer import anatomy, network
from weightspace.graph import ParameterGraph
began = time.perf_counter()
found = anatomy.structure(sys.argv[1])
graph = ParameterGraph.from_description(found.graph)
drawing = network.arrange(graph, [row[0] for row in found.rows])
figure = network.draw(drawing).to_json()
opened = network.open_axis(sys.argv[1], list(drawing.nodes)[1])
print(json.dumps({"seconds": time.perf_counter() - began, "anonymous": peak * 1024, "nodes": len(drawing.nodes),
                  "parts": sorted(drawing.parts.values()), "parameters": graph.num_parameters, "json": len(figure),
                  "opened": len(opened)}))
"""


def llama(folder: Path, layers: int = 16, hidden: int = 2048, inner: int = 8192, words: int = 32_000) -> Path:
    """A Llama of 1.1 billion parameters in bfloat16 (2.2 GB, all zero, none of it on the disk)."""
    shapes = {"model.embed_tokens.weight": (words, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden), f"{at}.self_attn.k_proj.weight": (512, hidden),
            f"{at}.self_attn.v_proj.weight": (512, hidden), f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (inner, hidden), f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner), f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    end, header = 0, {}
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "head_dim": 64,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32, "vocab_size": words,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }))  # fmt: skip
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_graph_of_a_billion_parameters_is_drawn_without_reading_them(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="a Llama is wired through the extra transformers")
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(llama(tmp_path / "llama"))], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["parameters"] > 1e9
    # Sixteen attentions and sixteen perceptrons, each drawn once.
    assert found["parts"] == [16, 16]
    assert found["nodes"] < 20
    assert found["json"] < 100_000
    assert 1 <= found["opened"] <= 6
    # Far below the 4.4 GB of its weights in float32.
    assert found["anonymous"] < 1.6e9
