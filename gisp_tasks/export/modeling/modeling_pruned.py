"""Decoders whose layers differ in size: each layer is built from its own entry of `config.per_layer_config`.

This file is part of the checkpoint beside it. It needs transformers (5.19 or newer) and nothing else. What differs
from the stock classes stands in the three classes at the top; below them, each architecture says what it is made of.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class PrunedConfig:
    """A stock configuration with `per_layer_config` and an explicit `head_dim`."""

    def validate_architecture(self):
        """Nothing to refuse: head counts differ by layer, and `head_dim` says how wide a head is."""


class PrunedModel:
    """A stock decoder, built layer by layer; `layer_class` is the architecture's layer."""

    def __init__(self, config):
        # The stock constructor would build every layer at one size, so it is shown none.
        num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
        super().__init__(config)
        config.num_hidden_layers = num_layers
        self.layers.extend(self.layer_class(config.per_layer_config[i], i) for i in range(num_layers))
        for layer in self.layers:
            # Per-layer configurations are copies: the attention implementation is set on the shared one.
            layer.self_attn.config = config
            layer.mlp.config = config
        self.post_init()


class PrunedForCausalLM:
    """A stock language model around a pruned decoder, which `model_class` names."""

    def __init__(self, config):
        # Not the stock constructor: it would build the stock decoder.
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@strict
class PrunedLlamaConfig(PrunedConfig, LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaModel(PrunedModel, LlamaModel):
    config_class = PrunedLlamaConfig
    layer_class = LlamaDecoderLayer


class PrunedLlamaForCausalLM(PrunedForCausalLM, LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    model_class = PrunedLlamaModel


@strict
class PrunedMistralConfig(PrunedConfig, MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralModel(PrunedModel, MistralModel):
    config_class = PrunedMistralConfig
    layer_class = MistralDecoderLayer


class PrunedMistralForCausalLM(PrunedForCausalLM, MistralForCausalLM):
    config_class = PrunedMistralConfig
    model_class = PrunedMistralModel


@strict
class PrunedQwen2Config(PrunedConfig, Qwen2Config):
    model_type = "pruned_qwen2"


class PrunedQwen2Model(PrunedModel, Qwen2Model):
    config_class = PrunedQwen2Config
    layer_class = Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(PrunedForCausalLM, Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    model_class = PrunedQwen2Model


@strict
class PrunedQwen3Config(PrunedConfig, Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Model(PrunedModel, Qwen3Model):
    config_class = PrunedQwen3Config
    layer_class = Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(PrunedForCausalLM, Qwen3ForCausalLM):
    config_class = PrunedQwen3Config
    model_class = PrunedQwen3Model
