"""An MLflow model around a Hugging Face checkpoint, so that the weights are stored once.

MLflow's own ``log_model`` copies the weights through the tracking server. Here the checkpoint stays where it is,
in ``model/``, and what MLflow needs to load it is written beside it::

    MLmodel                 flavours transformers and python_function, signature text -> text
    python_env.yaml         the Python and the packages of the environment that wrote it
    requirements.txt
    components/tokenizer/   the checkpoint's files without its weights
    model/                  config.json, weights, tokenizer, and the modelling file if the architecture needs one

A directory of that form is a source that ``create_model_version`` takes as it is. MLflow loads an architecture
that transformers does not have through ``auto_map`` of ``config.json`` and runs the modelling file beside it;
this package is not needed to load a model.
"""

import json
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import mlflow.transformers
import yaml
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from gisp_tasks.errors import InputError

MODEL_DIRECTORY = "model"
TOKENIZER_DIRECTORY = "components/tokenizer"
# What a process needs to load and run the model; accelerate, because MLflow places weights through it.
_REQUIREMENTS = ("accelerate", "mlflow", "torch", "transformers")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")
_UUID_DIGITS = 32


def write_mlmodel(directory: Path, *, digest: str, metadata: Mapping[str, str] | None = None) -> None:
    """Make ``directory``, which holds a checkpoint in ``model/``, an MLflow model.

    Equal inputs give equal bytes: the model's identifier is taken from ``digest`` and no time is written.

    Args:
        directory: holds ``model/`` with config.json, tokenizer_config.json, the tokenizer and the weights.
        digest: hex SHA-256 of the checkpoint.
        metadata: shown by ``Model.metadata``, e.g. base model, revision and level.

    Raises:
        InputError: ``model/`` lacks a file that MLflow needs to load it, or its config.json names no architecture.
    """
    config = _read_config(directory / MODEL_DIRECTORY)
    _copy_tokenizer(directory)
    _write_environment(directory)
    model = Model(
        signature=_signature(),
        model_uuid=digest[:_UUID_DIGITS],
        model_size_bytes=sum(p.stat().st_size for p in (directory / MODEL_DIRECTORY).rglob("*") if p.is_file()),
        metadata=dict(metadata or {}),
    )
    model.add_flavor(mlflow.transformers.FLAVOR_NAME, **_transformers_flavor(config))
    mlflow.pyfunc.add_to_model(model, loader_module="mlflow.transformers", python_env="python_env.yaml")
    fields = model.to_dict()
    del fields["utc_time_created"]  # a clock's time would give each attempt other bytes
    (directory / "MLmodel").write_text(yaml.safe_dump(fields), encoding="utf-8")


def _read_config(checkpoint: Path) -> dict[str, Any]:
    needed = ("config.json", "tokenizer_config.json")
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if missing:
        raise InputError(
            f"an MLflow model was asked for around {checkpoint}, which has no {', '.join(missing)}; MLflow loads a "
            f"checkpoint only with {', '.join(needed)}. Save the model and its tokenizer there first"
        )
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if not config.get("architectures"):
        raise InputError(
            f"an MLflow model was asked for around {checkpoint}, whose config.json has no `architectures`; MLflow "
            f"loads the one class named there, e.g. LlamaForCausalLM. Add it to config.json"
        )
    return config


def _transformers_flavor(config: Mapping[str, Any]) -> dict[str, Any]:
    flavor = {
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": config["architectures"][0],
        "model_binary": MODEL_DIRECTORY,
        "components": ["tokenizer"],
        # Not the class that tokenizer_config.json names: AutoTokenizer corrects some of those by config.json, and
        # the served tokenizer must be the one that the evaluation used.
        "tokenizer_type": "AutoTokenizer",
    }
    dtype = config.get("dtype") or config.get("torch_dtype")  # transformers 4 wrote torch_dtype
    return flavor | ({"torch_dtype": f"torch.{dtype}"} if dtype else {})


def _signature() -> ModelSignature:
    # Greedy by default, so that a registered level answers the same question in the same way; callers may override.
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 256),
                ParamSpec("do_sample", DataType.boolean, False),
            ]
        ),
    )


def _copy_tokenizer(directory: Path) -> None:
    """Copy all files but the weights: config.json takes part in the choice of the tokenizer's class."""
    target = directory / TOKENIZER_DIRECTORY
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted((directory / MODEL_DIRECTORY).iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)


def _write_environment(directory: Path) -> None:
    # A local version label (2.13.0+cpu) names a build that a package index may not have.
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS]
    (directory / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (directory / "python_env.yaml").write_text(yaml.safe_dump(environment), encoding="utf-8")
