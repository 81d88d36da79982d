"""Models that the oracles are computed on: seeded tiny ones and a small trained one, as directories on disk."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from gisp_tasks.pruning.objectives import Candidate, Item

_COMMON = {"num_hidden_layers": 3, "vocab_size": 61, "max_position_embeddings": 64, "intermediate_size": 40}

# head_dim is explicit and never hidden_size / num_attention_heads, but for one whose config.json has none. Windows of
# sliding attention are shorter than the sequences. Without a model_type: Llama.
TINY: dict[str, dict[str, Any]] = {
    "mqa-tied": {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "tie_word_embeddings": True,
    },
    "gqa-untied-biases": {
        "hidden_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gqa-tied-attention-bias": {
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "mha-untied-mlp-bias": {
        "hidden_size": 20,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "mlp_bias": True,
    },
    "mistral-gqa-untied-sliding": {
        "model_type": "mistral",
        "hidden_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "sliding_window": 8,
    },
    "qwen2-gqa-tied-no-head-dim": {
        "model_type": "qwen2",
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen2-gqa-untied-sliding": {
        "model_type": "qwen2",
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3-gqa-tied": {
        "model_type": "qwen3",
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "tie_word_embeddings": True,
    },
    "qwen3-gqa-untied-biases": {
        "model_type": "qwen3",
        "hidden_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
}


@dataclass(frozen=True)
class Model:
    """A model directory and its config.json, with the head_dim that an absent one means."""

    path: Path
    config: dict[str, Any]

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The stock class of transformers, in evaluation mode."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).eval()


def _build(directory: Path, model_type: str = "llama", **sizes: Any) -> Model:
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_COMMON, **sizes, **tokens}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start at constants: no test would see them cut wrongly.
            offset = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(offset + 0.25 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    return Model(directory, {"head_dim": config["hidden_size"] // config["num_attention_heads"], **config})


@pytest.fixture(scope="session")
def build_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """Build a tiny model of the sizes given."""
    return lambda **sizes: _build(tmp_path_factory.mktemp("tiny"), **sizes)


@pytest.fixture(scope="session")
def tiny_models(build_tiny: Callable[..., Model]) -> dict[str, Model]:
    """One model a configuration of `TINY`."""
    return {name: build_tiny(**sizes) for name, sizes in TINY.items()}


@pytest.fixture(params=list(TINY))
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, Model]) -> Model:
    """Each tiny model in turn."""
    return tiny_models[request.param]


@pytest.fixture(scope="session")
def stories(testdata: Path) -> Model:
    """The trained model of 260 thousand parameters."""
    path = testdata / "models" / "stories260K"
    return Model(path, json.loads((path / "config.json").read_text()))


@pytest.fixture(params=["stories260K", *TINY])
def model(request: pytest.FixtureRequest, tiny_models: dict[str, Model]) -> Model:
    """The trained model, then each tiny one."""
    if request.param in tiny_models:
        return tiny_models[request.param]
    return request.getfixturevalue("stories")


@pytest.fixture(params=["stories260K", *TINY, pytest.param("smollm2", marks=pytest.mark.slow)])
def every_model(request: pytest.FixtureRequest, tiny_models: dict[str, Model]) -> Model:
    """As `model`, and a real one."""
    if request.param in tiny_models:
        return tiny_models[request.param]
    return request.getfixturevalue({"stories260K": "stories", "smollm2": "smollm2_model"}[request.param])


@pytest.fixture(scope="session")
def smollm2_model(smollm2: Path) -> Model:
    """SmolLM2-135M-Instruct."""
    return Model(smollm2, json.loads((smollm2 / "config.json").read_text()))


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the norms of a float64 model compute in float64: as shipped, they round to float32 on the way."""

    def forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.fixture
def random_sequences() -> Callable[..., list[np.ndarray]]:
    """Sequences of random tokens, of the lengths given."""

    def make(vocab: int, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
        generator = np.random.default_rng(seed)
        return [generator.integers(0, vocab, length, dtype=np.int32) for length in lengths]

    return make


@pytest.fixture
def many_items() -> Callable[[int], list[Item]]:
    """Items of every kind of overlap between candidates, random tokens, the correct candidate first."""

    def make(vocab: int) -> list[Item]:
        generator = np.random.default_rng(0)

        def some(count: int) -> list[int]:
            return generator.integers(0, vocab, count).tolist()

        def item(*candidates: tuple[list[int], list[int]]) -> Item:
            made = [Candidate(np.array(prompt + answer, dtype=np.int64), len(prompt)) for prompt, answer in candidates]
            return Item(made[0], tuple(made[1:]))

        def of(prompt: int, *answers: int) -> Item:
            shared = some(prompt)
            return item(*((shared, some(count)) for count in answers))

        start, prompt, answer = some(6), some(5), some(4)
        return [
            of(5, 3, 2),
            of(2, 1, 4, 1, 6),
            of(9, 2, 2, 2),
            of(1, 7, 1, 3, 2, 5),
            # WinoGrande: the prompts differ, in length too, and the answers are the same.
            item(([*start, 3], answer), ([*start, 4, 5], answer)),
            # Nothing in common, not even the first token.
            item(([7, *prompt], answer), ([8, *prompt], answer)),
            # Answers that begin alike: the common prefix would reach into them.
            item((prompt, [*answer, 1, 2]), (prompt, [*answer, 3])),
            # One answer begins another, and one is the correct one again.
            item((prompt, answer), (prompt, answer[:2]), (prompt, answer)),
            # What is prompt in one candidate is answer in the other.
            item((prompt + answer[:2], answer[2:]), (prompt, [*answer, 1])),
        ]

    return make


@pytest.fixture
def random_keep() -> Callable[[dict[str, Any]], list[tuple[list[int], list[int]]]]:
    """What a random subnetwork keeps: (kv groups, channels) by layer, each list rising, of uneven lengths."""

    def make(config: dict[str, Any], seed: int = 3) -> list[tuple[list[int], list[int]]]:
        generator = np.random.default_rng(seed)
        groups, channels = config["num_key_value_heads"], config["intermediate_size"]
        kept = []
        for _ in range(config["num_hidden_layers"]):
            num_groups = int(generator.integers(1, groups + 1))
            num_channels = int(generator.integers(channels // 4, channels))
            kept.append(
                (
                    sorted(generator.choice(groups, num_groups, replace=False).tolist()),
                    sorted(generator.choice(channels, num_channels, replace=False).tolist()),
                )
            )
        return kept

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
