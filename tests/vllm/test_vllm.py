"""vLLM serves a level, by its own code and without any (`make test-vllm`).

vLLM lives in an environment of its own, because it pins what it runs with: `serve.py` runs there, this module here.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from serve import NEW_TOKENS, PROMPTS

from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.export.reload import load_model, load_tokenizer
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import KeepSets

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="vLLM is not installed here: make test-vllm"),
]


@pytest.fixture(scope="module")
def level(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with layers of different sizes: single groups gone, and the narrowest channels."""
    geometry = geometry_of(json.loads((smollm2 / "config.json").read_text()))
    keep = KeepSets.everything(geometry)
    model, generator = load_model(smollm2, dtype="float32", device="cpu"), torch.Generator().manual_seed(0)
    for number, layer in enumerate(model.model.layers):
        norms = layer.mlp.down_proj.weight.norm(dim=0)
        keep.mlp[number, norms.argsort()[: 32 * int(torch.randint(1, 12, (1,), generator=generator))].numpy()] = False
        if number % 4 == 1:
            keep.attention[number, number % geometry.num_kv_groups] = False
    out = tmp_path_factory.mktemp("level")
    write_checkpoint(smollm2, out, geometry=geometry, keep=keep, dtype="float32")
    return out


@pytest.fixture(scope="module")
def expected(level: Path) -> list[list[int]]:
    """Greedy tokens of transformers."""
    model, tokenizer = load_model(level, dtype="float32", device="cpu"), load_tokenizer(level)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out: Any = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("remote_code", [False, True], ids=["plugin", "remote code"])
def test_greedy_tokens_are_those_of_transformers(level: Path, expected: Any, remote_code: bool, tmp_path: Path):
    # With code of its own no plugin is loaded: an empty list of them.
    plugins = {"VLLM_PLUGINS": ""} if remote_code else {}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), **plugins}
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("serve.py"), level, *(["--trust-remote-code"] if remote_code else [])],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"model"')]  # vLLM writes there too
    assert json.loads(line)["tokens"] == expected
