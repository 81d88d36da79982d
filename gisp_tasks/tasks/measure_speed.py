"""The speed of a checkpoint beside the dense model's: in torch, and in llama.cpp where that is installed."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisp_tasks.errors import InputError
from gisp_tasks.recipe import SpeedEvaluation
from gisp_tasks.tasks.measure import placed
from gisp_tasks.tasks.runtime import Json, scratch

if TYPE_CHECKING:
    from gisp_tasks.evaluation.speed import Rates

logger = logging.getLogger(__name__)
_THIS, _DENSE = "this", "dense"


def measure_speed(
    checkpoint: Path,
    section: SpeedEvaluation,
    *,
    dense: Path | None,
    dtype: str,
    gguf: str | None = None,
    trust_remote_code: bool = False,
) -> Json:
    """Metrics and protocol of a checkpoint's speed.

    llama.cpp is measured where its package ``llama_cpp`` is installed and it can serve the architecture.

    Args:
        checkpoint: a Hugging Face directory.
        section: the recipe's ``evaluation.speed``.
        dense: the directory of a model to compare it with, measured in turn with it.
        dtype: type to hold the weights in.
        gguf: type of the matrices of the files that llama.cpp reads; None: ``dtype``.
        trust_remote_code: run code that the checkpoints carry.

    Returns:
        As `measure.measure`; the dense model's own figures stand in the protocol.

    Raises:
        InputError: more tokens are asked for than the model's context.
    """
    directories = {_THIS: checkpoint, **({_DENSE: dense} if dense else {})}
    found = _in_torch(directories, section, dtype, trust_remote_code)
    if find_spec("llama_cpp") is not None:
        more = _in_llama_cpp(directories, section, gguf or dtype)
        found = {part: {**found[part], **more[part]} for part in found}
    return found


def _in_torch(directories: Mapping[str, Path], section: SpeedEvaluation, dtype: str, trust_remote_code: bool) -> Json:
    import torch

    from gisp_tasks.evaluation import speed
    from gisp_tasks.export.reload import load_model

    models = {
        name: load_model(directory, dtype=dtype, trust_remote_code=trust_remote_code)
        for name, directory in directories.items()
    }
    measured = speed.measure_speed(models, section)
    metrics = {
        **_rates("speed", measured),
        "speed_weight_bytes": float(measured[_THIS].weight_bytes),
        "speed_kv_cache_bytes_per_token": float(measured[_THIS].kv_cache_bytes_per_token),
    }
    model = models[_THIS]
    facts = {
        **section.model_dump(),
        **placed(model),
        "runtime": f"torch {torch.__version__}",
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
    }
    return _result(metrics, facts, measured)


def _in_llama_cpp(directories: Mapping[str, Path], section: SpeedEvaluation, dtype: str) -> Json:
    import torch

    from gisp_tasks.evaluation import speed_llama_cpp
    from gisp_tasks.export.gguf import write_gguf

    threads = torch.get_num_threads()
    with scratch() as place:
        files = {name: place / f"{name}.gguf" for name in directories}
        try:
            for name, directory in directories.items():
                write_gguf(directory, files[name], dtype=dtype, name=name)
        except InputError as error:
            logger.info("speed is not measured in llama.cpp: %s", error)
            return {"metrics": {}, "protocol": {}}
        measured = speed_llama_cpp.measure_speed(files, section, threads=threads)
        sizes = {name: file.stat().st_size for name, file in files.items()}
    metrics = {**_rates("speed_llama_cpp", measured), "speed_llama_cpp_file_bytes": float(sizes[_THIS])}
    facts = {
        **section.model_dump(), **speed_llama_cpp.describe(), "gguf": dtype, "threads": threads, "file_bytes": sizes
    }  # fmt: skip
    return _result(metrics, facts, measured)


def _rates(prefix: str, measured: Mapping[str, "Rates"]) -> dict[str, float]:
    """Tokens a second, and how many times the dense model's."""
    metrics: dict[str, float] = {}
    for phase in ("prefill", "decode"):
        rates = {name: getattr(found, f"{phase}_tokens_per_s") for name, found in measured.items()}
        metrics[f"{prefix}_{phase}_tokens_per_s"] = rates[_THIS]
        if _DENSE in rates:
            metrics[f"{prefix}_{phase}_over_dense"] = rates[_THIS] / rates[_DENSE]
    return metrics


def _result(metrics: dict[str, float], facts: Json, measured: Mapping[str, Any]) -> Json:
    facts = {**facts, "measured": {name: asdict(found) for name, found in measured.items()}}
    return {"metrics": metrics, "protocol": dict.fromkeys(metrics, facts)}
