"""A level is trainable: low-rank adapters of stock PEFT on a checkpoint whose layers differ in size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.recipe import ModelSection
from gisp_tasks.stores.model_source import read_config

STORY = "Once upon a time, there was a robot who liked to count to seven. Every day it said the same words again."
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def level(testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A level of stories260K, every layer of another size."""
    base, out = testdata / "models/stories260K", tmp_path_factory.mktemp("level")
    geometry = geometry_of(read_config(ModelSection(source=str(base))))
    keep = KeepSets.everything(geometry)
    for layer in range(geometry.num_layers):
        keep.attention[layer, : layer % geometry.num_kv_groups] = False
        keep.mlp[layer, : 32 * (layer % 3)] = False
    write_checkpoint(base, out, geometry=geometry, keep=keep, dtype="float32")
    return out


def _load(level: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(level, trust_remote_code=True, dtype="float32")


def test_low_rank_adapters_train_save_and_merge(level: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = AutoTokenizer.from_pretrained(level, trust_remote_code=True)(STORY, return_tensors="pt").input_ids
    model = get_peft_model(_load(level), LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    assert sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) == 5 * len(TARGETS)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], "twelve steps on one story must be felt"
    assert np.isfinite(losses).all()
    model.eval()
    with torch.inference_mode():
        trained = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(_load(level), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, trained)
        with again.disable_adapter():
            assert torch.equal(again(input_ids=ids).logits, _load(level).eval()(input_ids=ids).logits)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = _load(tmp_path / "merged").eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
