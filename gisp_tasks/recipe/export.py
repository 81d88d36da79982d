"""In which forms a level is written."""

from typing import Literal

from gisp_tasks.recipe.section import Section


class ExportSection(Section):
    """What is written of a level."""

    auto_map: bool = True
    """Put the modelling file into the Hugging Face directory, so that it loads with `trust_remote_code=True` where this
    package is not installed. False: it loads only where it is (`import gisp_tasks.export.registered`; vLLM needs no
    import)."""
    gguf: Literal["none", "float32", "float16", "bfloat16", "q8_0"] = "none"
    """A file for llama.cpp, `levels/<level>/<level>.gguf`, with matrices of this type. For llama, mistral and qwen2;
    llama.cpp's architecture with layers of different sizes has no query/key norms, so not for qwen3."""
