"""Most memory that `gisp materialize` takes for a level of a large model (`make benchmark`).

A Llama of seeded random weights is written, tensor by tensor, with a random removal order; a fresh process then cuts
a level from it. What the process had resident is set against the sizes of the model and of its largest tensor.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gisp_tasks.export.safetensors_stream import TensorPlan, write_safetensors
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.ranking import Limits, next_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry

SPARSITY = 0.4
DTYPE = torch.bfloat16
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2560, "intermediate_size": 8192,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32768, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
# Runs one command and prints the most memory it had resident.
WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module("gisp_tasks.cli", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", int(line.split()[1]) * 1024)
"""


def _shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    hidden, width = geometry.hidden_size, geometry.intermediate_size
    queries, keys = (heads * geometry.head_dim for heads in (geometry.num_query_heads, geometry.num_kv_groups))
    layer = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (geometry.vocab_size, hidden),
        "lm_head.weight": (geometry.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for number in range(geometry.num_layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def write_model(directory: Path, gib: float) -> tuple[int, int]:
    """A model of at least ``gib`` GiB; returns the bytes of its weights and of its largest tensor."""
    layers = 1
    while True:
        config = {**CONFIG, "num_hidden_layers": layers}
        geometry = geometry_of(config)
        size = (geometry.decoder_parameters + geometry.other_parameters) * DTYPE.itemsize
        if size >= gib * 2**30:
            break
        layers += 1
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def plan(name: str, shape: tuple[int, ...]) -> TensorPlan:
        return TensorPlan(name, shape, lambda: torch.randn(shape, generator=generator, dtype=DTYPE) * 0.02)

    tensors = [plan(name, shape) for name, shape in sorted(_shapes(geometry).items())]
    write_safetensors(directory / "model.safetensors", tensors, dtype=DTYPE)
    _write_order(directory.parent / "removal_order.safetensors", geometry)
    return size, max(tensor.num_bytes(DTYPE) for tensor in tensors)


def _write_order(path: Path, geometry: Geometry) -> None:
    random = np.random.default_rng(0)
    scores = StructureScores(
        random.random((geometry.num_layers, geometry.num_kv_groups), dtype=np.float32),
        random.random((geometry.num_layers, geometry.intermediate_size), dtype=np.float32),
    )
    limits = Limits(np.zeros(geometry.num_layers, dtype=np.bool_), 1, 32, 32)
    removals = next_removals(scores, RemovalOrder.empty().removals, geometry, limits, SPARSITY)
    facts = {"geometry": json.dumps(dataclasses.asdict(geometry)), "granularity": "kv_group", "base_source": "random"}
    RemovalOrder.empty().extend(removals, 1).save(path, geometry, facts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the model")
    parser.add_argument("--directory", type=Path, default=None, help="where it lies for the time being")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gisp-", dir=options.directory) as place:
        base, out = Path(place) / "base", Path(place) / "level"
        size, largest = write_model(base, options.gib)
        asked = ["materialize", "--model", base, "--order", base.parent / "removal_order.safetensors", "--out", out]
        began = time.perf_counter()
        command = [sys.executable, "-c", WATCHED, "gisp", *map(str, asked), "--sparsity", str(SPARSITY)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        peak = int(done.stdout.splitlines()[-1].split()[1])
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        found = {"model": size, "largest tensor": largest, "level": written, "peak": peak}
        for name, value in found.items():
            print(f"{name:15} {value / 2**30:.2f} GiB")
        print(f"{'time':15} {seconds:.0f} s")
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
