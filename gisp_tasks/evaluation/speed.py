"""How fast models read a prompt and decode after it, side by side, and what their weights and caches weigh."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gisp_tasks.recipe import SpeedEvaluation

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast one model is.

    Args:
        prefill_tokens_per_s: prompt tokens of the batch over the seconds until the first new token, median.
        decode_tokens_per_s: new tokens of the batch over the seconds that they took, median.
        prefill_seconds: of each repetition, in turn with those of the other models.
        decode_seconds: the same.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Speed(Rates):
    """One model in torch.

    Args:
        weight_bytes: of the parameters in memory, tied ones once.
        kv_cache_bytes_per_token: of one sequence's cache.
    """

    weight_bytes: int
    kv_cache_bytes_per_token: int


def in_turn(
    readers: Mapping[str, Callable[[], tuple[float, float]]], section: SpeedEvaluation, *, batch_size: int
) -> dict[str, Rates]:
    """Let models read and decode in turn, so that whatever else the machine does meets all of them alike.

    Args:
        readers: name -> reads the prompts and decodes after them once; returns the seconds of both.
        section: sizes and repetitions.
        batch_size: prompts that a reader reads at once.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(section.repetitions):
        for name, read in readers.items():
            seconds[name].append(read())
    found = {}
    for name, pairs in seconds.items():
        prefill, decode = zip(*pairs, strict=True)
        found[name] = Rates(
            prefill_tokens_per_s=batch_size * section.prompt_tokens / statistics.median(prefill),
            decode_tokens_per_s=batch_size * section.new_tokens / statistics.median(decode),
            prefill_seconds=prefill,
            decode_seconds=decode,
        )
    return found


def measure_speed(models: Mapping[str, Any], section: SpeedEvaluation) -> dict[str, Speed]:
    """Measure models of transformers in turn.

    Every model first runs once without being timed. Prompts are random tokens: speed does not depend on them.

    Args:
        models: name -> a causal language model of transformers, all on one device.
        section: sizes and repetitions.

    Raises:
        InputError: prompt and new tokens are more than a model's context.
    """
    for model in models.values():
        section.require_context(int(model.config.max_position_embeddings))
    vocabulary = min(int(model.config.vocab_size) for model in models.values())
    device = next(iter(models.values())).device
    generator = torch.Generator().manual_seed(_SEED)
    shape = (section.batch_size, section.prompt_tokens)
    prompt = torch.randint(vocabulary, shape, generator=generator).to(device)
    caches = {name: _once(model, prompt, 1)[2] for name, model in models.items()}
    readers = {name: partial(_seconds, model, prompt, section.new_tokens) for name, model in models.items()}
    return {
        name: Speed(
            **vars(rates),
            weight_bytes=sum(parameter.nbytes for parameter in models[name].parameters()),
            kv_cache_bytes_per_token=caches[name],
        )
        for name, rates in in_turn(readers, section, batch_size=section.batch_size).items()
    }


def _seconds(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    prefill, decode, _ = _once(model, prompt, new_tokens)
    return prefill, decode


def _once(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prompt, seconds of the new tokens, bytes of the cache for one token of one sequence."""
    with torch.inference_mode():
        prefill, output = _timed(model.device, lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))
        cache = output.past_key_values
        size = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

        def decode() -> None:
            result = output
            for _ in range(new_tokens):
                token = result.logits[:, -1:].argmax(dim=-1)
                result = model(input_ids=token, past_key_values=result.past_key_values, use_cache=True)

        seconds, _ = _timed(model.device, decode)
    return prefill, seconds, size // prompt.numel()


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    _wait(device)
    began = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - began, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
