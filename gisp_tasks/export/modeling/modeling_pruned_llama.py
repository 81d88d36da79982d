"""Llama whose layers differ in size: each is built from its own entry of `config.per_layer_config`.

This file is part of the checkpoint beside it. It needs transformers (5.19 or newer) and nothing else.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


@strict
class PrunedLlamaConfig(LlamaConfig):
    """LlamaConfig with `per_layer_config` and an explicit `head_dim`."""

    model_type = "pruned_llama"

    def validate_architecture(self):
        """Head counts differ by layer and need not divide the hidden size: `head_dim` says how wide a head is."""
        if self.head_dim is None:
            raise ValueError("a pruned Llama needs an explicit `head_dim`")


class PrunedLlamaModel(LlamaModel):
    """LlamaModel, built layer by layer."""

    config_class = PrunedLlamaConfig

    def __init__(self, config):
        # The constructor of LlamaModel would build all layers at one size.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        for layer in self.layers:
            # Per-layer configurations are copies: the attention implementation is set on the shared one.
            layer.self_attn.config = config
            layer.mlp.config = config
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM around `PrunedLlamaModel`."""

    config_class = PrunedLlamaConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
