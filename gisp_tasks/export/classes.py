"""The classes of levels, by the ``model_type`` of their configuration."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from gisp_tasks.export.modeling import modeling_pruned

LANGUAGE_MODELS: Mapping[str, type[PreTrainedModel]] = {
    language_model.config_class.model_type: language_model
    for language_model in (
        modeling_pruned.PrunedLlamaForCausalLM,
        modeling_pruned.PrunedMistralForCausalLM,
        modeling_pruned.PrunedQwen2ForCausalLM,
        modeling_pruned.PrunedQwen3ForCausalLM,
    )
}
