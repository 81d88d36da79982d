"""llama.cpp on the files that are written for it, against the masked dense model in torch.

`make test-llama-cpp` runs this; elsewhere it is skipped. llama.cpp's cache holds keys and values in float32 here, so
that what is compared is the graph.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import MODELS, SIZES, byte_level
from subnetworks import logits, masked, random_heads
from torch.nn import functional
from transformers import AutoTokenizer

from gisp_tasks.data import sources
from gisp_tasks.data.calibration import encode
from gisp_tasks.export.gguf import write_gguf
from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.export.reload import load_model, load_tokenizer
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.tasks.evaluate import evaluate
from gisp_tasks.tasks.export_gguf import export_gguf
from gisp_tasks.tasks.materialize import materialize
from gisp_tasks.tasks.prepare_calibration import prepare_calibration
from gisp_tasks.tasks.resolve_model import resolve_model
from gisp_tasks.tasks.score_and_prune import score_and_prune

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed here: make test-llama-cpp")

FLOAT32 = 0  # GGML_TYPE_F32
TOLERANCE = 2e-3
LEVELS = {"sp30": 0.3, "sp50": 0.5}
TOKENS, WINDOW = 1024, 256
TEXTS = (
    "Once upon a time, there was a little girl.",
    "  two spaces, a tab\t, a line\n\nand another\r\n",
    "It's 12345.678 % of 9_000; don't they'll I'M",
    "naïve café \u2013 “quotes” … 你好\uff0c世界 שלום 🙂👩\u200d👩\u200d👧",
    "def f(x):\n    return x**2  # ok\n",
    "<|im_start|>user\nHi<|im_end|>",
    "ÀÉÎõü ﬁ ½ ² \u00a0nbsp \u200bzero",
    "aaaaaaaaaaaaaaaaaaaaaaaa        b",
    " ",
    "x",
)


def _load(file: Path, context: int) -> Any:
    return llama_cpp.Llama(
        str(file), n_ctx=context, n_batch=context, logits_all=True, n_threads=1, type_k=FLOAT32, type_v=FLOAT32,
        verbose=False,
    )  # fmt: skip


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


@pytest.mark.parametrize("granularity", ["kv_group", "head"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_masked_model(name: str, granularity: str, build_tiny: Callable[..., Any], tmp_path: Path):
    model = build_tiny(**{**SIZES, **MODELS[name]})
    byte_level(model.path)
    geometry = geometry_of(model.config, granularity=granularity)
    keep = random_heads(model.config, granularity=granularity)
    keep.attention[1], keep.mlp[1] = False, False
    keep = KeepSets(keep.attention, keep.mlp, dead_width=32)
    write_checkpoint(model.path, tmp_path / "level", geometry=geometry, keep=keep, dtype="float32")
    write_gguf(tmp_path / "level", tmp_path / "level.gguf", dtype="float32", name=name)
    ids = np.random.default_rng(0).integers(3, 300, 40).tolist()
    found, expected = _logits(_load(tmp_path / "level.gguf", 64), ids), logits(masked(model, keep), torch.tensor([ids]))
    assert (found - expected[0]).abs().max() <= TOLERANCE
    assert (logits(model.load(), torch.tensor([ids])) - expected).abs().max() > 30 * TOLERANCE, "the cut must be felt"


def test_a_model_that_was_not_pruned_is_written_too(stories: Any, tmp_path: Path) -> None:
    write_gguf(stories.path, tmp_path / "dense.gguf", dtype="float32", name="stories")
    ids = np.random.default_rng(0).integers(3, 512, 60).tolist()
    found = _logits(_load(tmp_path / "dense.gguf", 64), ids)
    assert (found - logits(stories.load(), torch.tensor([ids]))[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["stories", pytest.param("smollm2_model", marks=pytest.mark.slow)])
def test_text_has_the_tokens_of_the_tokenizer(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(name)
    write_gguf(model.path, tmp_path / "dense.gguf", dtype="float16", name=name)
    served = llama_cpp.Llama(str(tmp_path / "dense.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    for text in TEXTS:
        found = served.tokenize(text.encode(), add_bos=False, special=True)
        assert found == tokenizer(text, add_special_tokens=False).input_ids, text


# ---- SmolLM2-135M through the pipeline ----


@pytest.fixture(scope="module")
def run(smollm2: Path, testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with a file for llama.cpp at each level, and the speed of the last; where its objects lie."""
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GISP_DATA_ROOT", str(testdata / "data"))
        recipe = {
            "name": "served",
            "model": {"source": str(smollm2), "dtype": "float32"},
            "calibration": {"dataset": "wikitext2", "split": "validation", "sequences": 16, "sequence_length": 128},
            "pruning": {"levels": list(LEVELS.values()), "steps": 2},
            "evaluation": {"speed": {"prompt_tokens": 64, "new_tokens": 4, "repetitions": 2}},
            "export": {"gguf": "float32"},
            "publish": {"store": f"file://{store}", "gate": {"max_perplexity_ratio": None}},
        }
        plan = resolve_model(recipe)
        prepare_calibration(recipe, plan)
        order = score_and_prune(recipe, plan, [1, 2], None)
        for level in LEVELS:
            model = materialize(recipe, plan, level, order)
            export_gguf(recipe, plan, level, model)
        evaluate(recipe, plan, "sp50", "speed", model)
        text = sources.find("wikitext2", "test").text()
    (directory,) = (store / "runs").iterdir()
    return directory, encode(load_tokenizer(smollm2), text)[:TOKENS]


def _perplexity(score: Callable[[list[int]], torch.Tensor], tokens: Any) -> float:
    """Of windows that do not overlap; the first token of each is only read."""
    windows = [tokens[i : i + WINDOW].tolist() for i in range(0, TOKENS, WINDOW)]
    losses = [functional.cross_entropy(score(ids)[:-1].double(), torch.tensor(ids[1:])) for ids in windows]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_perplexity_is_that_of_torch(level: str, run: Any, tmp_path: Path) -> None:
    directory, tokens = run
    checkpoint = directory / f"levels/{level}/model"
    model = load_model(checkpoint, dtype="float32")
    expected = _perplexity(lambda ids: logits(model, torch.tensor([ids]))[0], tokens)
    served = _load(directory / f"levels/{level}/{level}.gguf", WINDOW)
    found = _perplexity(lambda ids: _logits(served, ids), tokens)
    write_gguf(checkpoint, tmp_path / "q8.gguf", dtype="q8_0", name=level)
    small = _load(tmp_path / "q8.gguf", WINDOW)
    rounded = _perplexity(lambda ids: _logits(small, ids), tokens)
    print(f"{level}: torch {expected:.4f}, llama.cpp {found:.4f}, q8_0 {rounded:.4f}")
    assert found == pytest.approx(expected, rel=1e-3)
    assert rounded == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_the_speed_report_has_llama_cpp_beside_torch(run: Any) -> None:
    directory, _ = run
    report = json.loads((directory / "levels/sp50/evaluation/speed.json").read_text())
    assert {f"speed{runtime}_{phase}_{value}"
            for runtime in ("", "_llama_cpp") for phase in ("prefill", "decode")
            for value in ("tokens_per_s", "over_dense")} < report["metrics"].keys()  # fmt: skip
    facts = report["protocol"]["speed_llama_cpp_prefill_over_dense"]
    assert facts["gguf"] == "float32"
    medians = [sum(facts["measured"][name]["prefill_seconds"]) / 2 for name in ("dense", "this")]
    assert report["metrics"]["speed_llama_cpp_prefill_over_dense"] == pytest.approx(medians[0] / medians[1])
    assert report["metrics"]["speed_llama_cpp_file_bytes"] < 0.75 * facts["file_bytes"]["dense"]
