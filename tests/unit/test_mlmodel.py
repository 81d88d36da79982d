"""The MLflow model around a checkpoint: loadable by MLflow alone, the same bytes each time, weights kept once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gisp_tasks.errors import InputError
from gisp_tasks.export.mlmodel import write_mlmodel

DIGEST = "5e" * 32
PROMPT = "Once upon a time"
CUSTOM_CODE = """
import copy

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"
    layer_widths: list[int] | None = None


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    config_class = PrunedLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        for layer, width in zip(self.model.layers, config.layer_widths):
            layer_config = copy.copy(config)
            layer_config.intermediate_size = width
            layer.mlp = LlamaMLP(layer_config)
        self.post_init()
"""
# What a serving process runs: it has MLflow, transformers and torch, and must not need this package.
SERVE = """
import json, sys
sys.modules["gisp_tasks"] = None
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps([type(model.get_raw_model().model).__name__, model.predict([sys.argv[2]], {"max_new_tokens": 12})]))
"""


@pytest.fixture
def plain(testdata: Path, tmp_path: Path) -> Path:
    """A directory with the tiny Llama in ``model/``."""
    directory = tmp_path / "plain"
    shutil.copytree(testdata / "models" / "stories260K", directory / "model")
    return directory


@pytest.fixture
def custom(plain: Path, tmp_path: Path) -> Path:
    """The same with another MLP width in each layer, which only its own modelling file can build."""
    directory = tmp_path / "custom"
    shutil.copytree(plain, directory)
    checkpoint = directory / "model"
    config = json.loads((checkpoint / "config.json").read_text())
    widths = [config["intermediate_size"] - 4 * layer for layer in range(config["num_hidden_layers"])]
    config |= {
        "architectures": ["PrunedLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_pruned_llama.PrunedLlamaConfig",
            "AutoModelForCausalLM": "modeling_pruned_llama.PrunedLlamaForCausalLM",
        },
        "model_type": "pruned_llama",
        "layer_widths": widths,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "modeling_pruned_llama.py").write_text(CUSTOM_CODE)
    weights = load_file(checkpoint / "model.safetensors")
    for layer, width in enumerate(widths):
        mlp = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj"):
            weights[f"{mlp}.{name}.weight"] = weights[f"{mlp}.{name}.weight"][:width].clone()
        weights[f"{mlp}.down_proj.weight"] = weights[f"{mlp}.down_proj.weight"][:, :width].clone()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return directory


def _serve(directory: Path, home: Path) -> tuple[str, str]:
    """Class of the loaded model and its answer, from a process without this package."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(directory), PROMPT],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name, (answer,) = json.loads(done.stdout.splitlines()[-1])
    return name, answer


def _greedy(checkpoint: Path) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = model.generate(tokens, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def test_mlflow_alone_loads_a_plain_checkpoint(plain: Path, tmp_path: Path) -> None:
    write_mlmodel(plain, digest=DIGEST)
    assert _serve(plain, tmp_path) == ("LlamaForCausalLM", _greedy(plain / "model"))


def test_mlflow_alone_loads_custom_code(custom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_mlmodel(custom, digest=DIGEST)
    assert _serve(custom, tmp_path) == ("PrunedLlamaForCausalLM", _greedy(custom / "model"))


def test_equal_inputs_give_equal_bytes(plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    for directory in (plain, other, plain):  # the third: a second attempt over the files of the first
        write_mlmodel(directory, digest=DIGEST, metadata={"level": "sp40"})
    names = sorted(p.relative_to(plain) for p in plain.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert all((plain / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_what_mlflow_reads_of_it(plain: Path) -> None:
    from mlflow.models import Model

    write_mlmodel(plain, digest=DIGEST, metadata={"level": "sp40"})
    model = Model.load(plain)
    assert model.model_uuid == DIGEST[:32]
    assert model.metadata == {"level": "sp40"}
    assert model.model_size_bytes == sum(path.stat().st_size for path in (plain / "model").iterdir())
    assert model.flavors["transformers"]["torch_dtype"] == "torch.float32"
    requirements = (plain / "requirements.txt").read_text().split()
    assert f"transformers=={transformers.__version__}" in requirements
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements


def test_weights_are_there_once(plain: Path) -> None:
    write_mlmodel(plain, digest=DIGEST)
    assert [path.parent for path in plain.rglob("*.safetensors")] == [plain / "model"]


def test_the_tokenizer_copy_encodes_as_the_checkpoint_does(custom: Path) -> None:
    write_mlmodel(custom, digest=DIGEST)
    text = f"{PROMPT}, Lily's café — 12 apples.\n"
    copies = (custom / "model", custom / "components" / "tokenizer")
    checkpoint, served = (transformers.AutoTokenizer.from_pretrained(d, trust_remote_code=False) for d in copies)
    assert served(text).input_ids == checkpoint(text).input_ids
    assert type(served) is type(checkpoint)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(plain: Path, missing: str) -> None:
    (plain / "model" / missing).unlink()
    with pytest.raises(InputError, match=missing):
        write_mlmodel(plain, digest=DIGEST)
    assert not (plain / "MLmodel").exists()


def test_a_config_without_architecture_is_refused(plain: Path) -> None:
    path = plain / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="architectures"):
        write_mlmodel(plain, digest=DIGEST)
