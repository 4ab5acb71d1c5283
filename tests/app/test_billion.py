"""A network of a billion parameters, from a file that takes no room (its data are a hole): its graph, its layers.

``pytest -s tests/app/test_billion.py`` prints what each takes: seconds, seconds of the processor, and memory beside the
file.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
WATCHED = """
import json, sys, threading, time
peak = 0
def watch():
    global peak
    while True:
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak = max(peak, int(lines["RssAnon"].split()[0]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
from weightspace.explorer import anatomy, network, neurons
from weightspace.graph import ParameterGraph
began, busy = time.perf_counter(), time.process_time()
{work}
print(json.dumps(found | {{"seconds": round(time.perf_counter() - began, 1), "anonymous": peak * 1024,
                           "seconds of the processor": round(time.process_time() - busy, 1)}}))
"""
GRAPH = """
wired = anatomy.structure(sys.argv[1])
graph = ParameterGraph.from_description(wired.graph)
drawing = network.arrange(graph, [row[0] for row in wired.rows])
figure = network.draw(drawing).to_json()
opened = neurons.open_axis(sys.argv[1], list(drawing.nodes)[1])
found = {"nodes": len(drawing.nodes), "parts": sorted(drawing.parts.values()), "parameters": graph.num_parameters,
         "json": len(figure), "opened": len(opened)}
"""
LAYERS = """
read = anatomy.examine(sys.argv[1])
found = {"layers": len(read.layers), "channels": len(read.channels), "dead": len(read.odd_table())}
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


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    pytest.importorskip("transformers", reason="a Llama is wired through the extra transformers")
    return llama(tmp_path_factory.mktemp("billion") / "llama")


def measured(work: str, file: Path) -> dict[str, Any]:
    """What is found in a process of its own, and what it took."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(work=work), str(file)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    print(found)
    return found


def test_the_graph_of_a_billion_parameters_is_drawn_without_reading_them(file: Path) -> None:
    found = measured(GRAPH, file)
    assert found["parameters"] > 1e9
    # Sixteen attentions and sixteen perceptrons, each drawn once.
    assert found["parts"] == [16, 16]
    assert found["nodes"] < 20
    assert found["json"] < 100_000
    assert 1 <= found["opened"] <= 6
    # Far below the 4.4 GB of its weights in float32.
    assert found["anonymous"] < 1.6e9


def test_layers_and_channels_of_a_billion_parameters_are_read_a_tensor_at_a_time(file: Path) -> None:
    found = measured(LAYERS, file)
    assert found["layers"] == 16 * 9 + 3
    assert found["channels"] >= 16 * 2
    # Every weight is zero.
    assert found["dead"] > 16 * 8192
    assert found["anonymous"] < 1.6e9
