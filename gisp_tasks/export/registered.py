"""Levels without remote code: where this package is installed, its classes stand in for those in the checkpoint.

transformers has no entry points, so one import registers the classes there::

    import gisp_tasks.export.registered
    AutoModelForCausalLM.from_pretrained(DIRECTORY)  # no trust_remote_code

vLLM finds `register_vllm` by the entry point group ``vllm.general_plugins`` and needs no import. Nothing but
transformers is imported here, so that the package may be installed beside vLLM without its dependencies.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gisp_tasks.export.modeling import modeling_pruned

_LANGUAGE_MODELS = (
    modeling_pruned.PrunedLlamaForCausalLM,
    modeling_pruned.PrunedMistralForCausalLM,
    modeling_pruned.PrunedQwen2ForCausalLM,
    modeling_pruned.PrunedQwen3ForCausalLM,
)
# vLLM's runner of models that transformers defines; it reads the sizes of each layer from the modules.
_VLLM_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Make transformers' Auto classes know the pruned architectures; again does no harm."""
    for language_model in _LANGUAGE_MODELS:
        config = language_model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, language_model.model_class, exist_ok=True)
        AutoModelForCausalLM.register(config, language_model, exist_ok=True)


def register_vllm() -> None:
    """The plugin of vLLM, which calls it in each of its processes."""
    from vllm import ModelRegistry

    register()
    for language_model in _LANGUAGE_MODELS:
        ModelRegistry.register_model(language_model.__name__, _VLLM_BACKEND)


register()
