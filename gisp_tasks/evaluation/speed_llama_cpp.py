"""How fast llama.cpp reads a prompt and decodes after it, models side by side."""

import random
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp

from gisp_tasks.evaluation.speed import Rates, in_turn
from gisp_tasks.recipe import SpeedEvaluation

_SEED = 0
_MICRO_BATCH = 512
BATCH_SIZE = 1
"""Prompts at once: this is the speed that one user sees."""


def measure_speed(files: Mapping[str, Path], section: SpeedEvaluation, *, threads: int) -> dict[str, Rates]:
    """Measure GGUF files in turn, each model loaded once and run once without being timed.

    Layers are computed on the accelerator where this build of llama.cpp has one. Prompts are random tokens: speed does
    not depend on them.

    Args:
        files: name -> GGUF file.
        section: sizes and repetitions; its ``batch_size`` is not read.
        threads: of the processor.
    """
    models = {name: _load(file, section, threads) for name, file in files.items()}
    vocabulary = min(int(model.n_vocab()) for model in models.values())
    generator = random.Random(_SEED)  # noqa: S311 - no secret
    prompt = [generator.randrange(vocabulary) for _ in range(section.prompt_tokens)]
    for model in models.values():
        _read(model, prompt, 1)
    readers = {name: partial(_read, model, prompt, section.new_tokens) for name, model in models.items()}
    return in_turn(readers, section, batch_size=BATCH_SIZE)


def describe() -> dict[str, Any]:
    """What the figures depend on besides the files and the section."""
    return {
        "runtime": f"llama.cpp, llama_cpp {llama_cpp.__version__}",
        "offload": bool(llama_cpp.llama_supports_gpu_offload()),
        "batch_size": BATCH_SIZE,
        "flash_attention": True,
    }


def _load(file: Path, section: SpeedEvaluation, threads: int) -> Any:
    return llama_cpp.Llama(
        str(file),
        n_ctx=section.prompt_tokens + section.new_tokens,
        n_batch=_MICRO_BATCH,
        n_ubatch=_MICRO_BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1 if llama_cpp.llama_supports_gpu_offload() else 0,
        flash_attn=True,
        verbose=False,
    )


def _read(model: Any, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt and of the new tokens; which tokens they are does not matter, so none is sampled."""
    model.reset()
    began = time.perf_counter()
    model.eval(prompt)
    read = time.perf_counter()
    for token in prompt[:1] * new_tokens:
        model.eval([token])
    return read - began, time.perf_counter() - read
