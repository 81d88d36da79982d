"""Exported levels do what the masked dense model does, in all that a user of transformers, lm-eval and MLflow does.

Llama, Mistral, Qwen2 and Qwen3, key/value heads shared or not, embeddings tied or not, whole groups and single heads
removed; with a tokenizer also through lm-eval and MLflow. SmolLM2-135M is slow.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import SIZES, byte_level
from subnetworks import Level, greedy, logits, random_heads, write_level

from gisp_tasks.export.mlmodel import write_mlmodel
from gisp_tasks.export.reload import load_model

# Of logits up to 32 in size, float32. Heads of a shared key/value head are rearranged, so sums run in another order.
TOLERANCE = {"kv_group": 2e-4, "head": 1e-3}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def _ids(level: Level, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, level.base.config["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))


def _write(model: Any, granularity: str, directory: Path) -> Level:
    keep = random_heads(model.config, granularity=granularity)
    keep.attention[0] = True
    keep.mlp[0] = True
    return write_level(model, keep, directory, granularity=granularity)


@pytest.fixture(scope="session")
def written() -> dict[tuple[Path, str], Level]:
    """Levels written so far: all tests read the same ones."""
    return {}


@pytest.fixture(params=["kv_group", "head"])
def granularity(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def level(every_model: Any, granularity: str, written: dict[Any, Level], tmp_path_factory: Any) -> Level:
    """A random subnetwork of each model."""
    key = (every_model.path, granularity)
    if key not in written:
        written[key] = _write(every_model, granularity, tmp_path_factory.mktemp("level"))
    return written[key]


def test_logits_and_greedy_tokens_equal_the_masked_model(level: Level) -> None:
    sliced, dense, ids = level.load(), level.masked(), _ids(level, 20)
    expected, tolerance = logits(dense, ids), TOLERANCE[level.geometry.granularity]
    assert (logits(sliced, ids) - expected).abs().max() <= tolerance
    assert (logits(level.base.load(), ids) - expected).abs().max() > 30 * tolerance, "the cut must be felt"
    assert greedy(sliced, ids) == greedy(dense, ids)


def test_generation_is_the_same_with_and_without_cache(level: Level) -> None:
    model, ids = level.load(), _ids(level, 9)
    assert greedy(model, ids, use_cache=True) == greedy(model, ids, use_cache=False)
    assert greedy(model, ids, cache_implementation="static") == greedy(model, ids, use_cache=False)


def test_a_left_padded_batch_generates_what_each_prompt_does_alone(level: Level) -> None:
    model, long, short = level.load(), _ids(level, 11), _ids(level, 6, seed=1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], dim=1)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :5] = 0
    together = greedy(model, torch.cat([long, padded]), mask)
    assert together == [greedy(model, long)[0], greedy(model, short)[0]]


def test_eager_attention_equals_sdpa(level: Level) -> None:
    model, ids = level.load(), _ids(level, 20)
    assert model.config._attn_implementation == "sdpa"
    expected = logits(model, ids)
    model.set_attn_implementation("eager")
    # Weights come out of eager attention only: so the switch was seen by the layers.
    attentions = model(input_ids=ids, output_attentions=True).attentions
    per_layer = json.loads((level.path / "config.json").read_text())["per_layer_config"]
    assert [a.shape[1] for a in attentions] == [per_layer[str(i)]["num_attention_heads"] for i in range(len(per_layer))]
    assert (logits(model, ids) - expected).abs().max() <= TOLERANCE[level.geometry.granularity]
    assert torch.triu(attentions[0][0, 0], diagonal=1).abs().max() == 0, "attention is causal"


def test_save_pretrained_round_trip_is_exact(level: Level, tmp_path: Path) -> None:
    model = level.load()
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", dtype="float32", trust_remote_code=True, device="cpu")
    assert type(again).__name__ == f"Pruned{level.base.config['model_type'].capitalize()}ForCausalLM"
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model, _ids(level, 20)), logits(again, _ids(level, 20)))


# ---- with a tokenizer ----

QUESTION, ANSWERS = "the pruned model keeps what", (" the loss needs", " 12 345 heads")
_SERVE = """
import json, sys
sys.modules["gisp_tasks"] = None  # a serving process has MLflow, transformers and torch
import mlflow.pyfunc
for path in sys.argv[2:]:
    model = mlflow.pyfunc.load_model(path)
    answers = model.predict([sys.argv[1]], {"max_new_tokens": 12})
    print(json.dumps([type(model.get_raw_model().model).__name__, *answers]))
"""


@pytest.fixture(scope="module")
def families(build_tiny: Callable[..., Any], tmp_path_factory: Any) -> list[Level]:
    """A level of each family and granularity, in ``model/`` of a directory of its own."""
    found = []
    for family in FAMILIES:
        window = {"sliding_window": None} if family == "mistral" else {}
        model = build_tiny(**SIZES, model_type=family, tie_word_embeddings=family in ("llama", "qwen2"), **window)
        byte_level(model.path)
        found += [_write(model, each, tmp_path_factory.mktemp(family) / "model") for each in TOLERANCE]
    return found


def test_lm_eval_weighs_answers_as_the_masked_model_does(families: list[Level]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    for level in families:
        harness = HFLM(
            str(level.path), dtype="float32", device="cpu", trust_remote_code=True, batch_size=2, max_length=64
        )
        asked = [Instance("loglikelihood", {}, (QUESTION, answer), i) for i, answer in enumerate(ANSWERS)]
        found = harness.loglikelihood(asked, disable_tqdm=True)
        dense, tokenizer = level.masked(), AutoTokenizer.from_pretrained(level.base.path)
        prompt = tokenizer(QUESTION).input_ids
        for answer, (loglikelihood, _) in zip(ANSWERS, found, strict=True):
            tokens = tokenizer(QUESTION + answer).input_ids
            scores = logits(dense, torch.tensor([tokens]))[0].log_softmax(dim=-1)
            expected = sum(float(scores[i - 1, tokens[i]]) for i in range(len(prompt), len(tokens)))
            assert loglikelihood == pytest.approx(expected, abs=len(tokens) * TOLERANCE[level.geometry.granularity])


def test_mlflow_serves_what_the_masked_model_says(families: list[Level], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for number, level in enumerate(families):
        write_mlmodel(level.path.parent, digest=f"{number:064x}")
    done = subprocess.run(
        [sys.executable, "-c", _SERVE, QUESTION, *(str(level.path.parent) for level in families)],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    served = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for level, (name, answer) in zip(families, served, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(level.base.path)
        ids = tokenizer(QUESTION, return_tensors="pt").input_ids
        assert name == f"Pruned{level.base.config['model_type'].capitalize()}ForCausalLM"
        assert answer == tokenizer.decode([*ids[0], *greedy(level.masked(), ids)[0]], skip_special_tokens=True)
