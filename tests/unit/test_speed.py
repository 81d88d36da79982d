"""Speed of models side by side, on models that only count."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gisp_tasks.errors import InputError
from gisp_tasks.evaluation.speed import measure_speed
from gisp_tasks.recipe import SpeedEvaluation

CONTEXT = 64


class Counting:
    """A model that remembers what it was asked, in a log that several share."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=11, max_position_embeddings=CONTEXT)

    def __init__(self, name: str, log: list[tuple[str, int, int]]) -> None:
        self.name, self.log = name, log

    def parameters(self) -> list[torch.Tensor]:
        return [torch.zeros(3, 5, dtype=torch.bfloat16)]

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert int(input_ids.max()) < 11
        past = past_key_values.length if past_key_values else 0
        self.log.append((self.name, past, input_ids.shape[1]))
        length = past + input_ids.shape[1]
        keys = torch.zeros(input_ids.shape[0], 2, length, 4)
        layer = SimpleNamespace(keys=keys, values=keys)
        cache = SimpleNamespace(layers=[layer] * 3, length=length)
        return SimpleNamespace(logits=torch.zeros(input_ids.shape[0], 1, 11), past_key_values=cache)


def test_models_take_turns_and_read_the_same() -> None:
    log: list[tuple[str, int, int]] = []
    section = SpeedEvaluation(prompt_tokens=6, new_tokens=2, batch_size=2, repetitions=3)
    found = measure_speed({"a": Counting("a", log), "b": Counting("b", log)}, section)
    warm = [(name, past, tokens) for name in "ab" for past, tokens in ((0, 6), (6, 1))]
    timed = [(name, past, tokens) for name in "ab" for past, tokens in ((0, 6), (6, 1), (7, 1))]
    assert log == warm + 3 * timed
    for speed in found.values():
        assert len(speed.prefill_seconds) == len(speed.decode_seconds) == 3
        assert speed.prefill_tokens_per_s == pytest.approx(12 / sorted(speed.prefill_seconds)[1])
        assert speed.decode_tokens_per_s == pytest.approx(4 / sorted(speed.decode_seconds)[1])
        assert speed.weight_bytes == 30
        # Keys and values of three layers, two heads of four float32 numbers.
        assert speed.kv_cache_bytes_per_token == 3 * 2 * 2 * 4 * 4


def test_more_tokens_than_the_context_are_refused() -> None:
    section = SpeedEvaluation(prompt_tokens=CONTEXT, new_tokens=1)
    with pytest.raises(InputError, match="64 \\+ 1 tokens"):
        measure_speed({"a": Counting("a", [])}, section)
