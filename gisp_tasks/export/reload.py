"""Loading checkpoints, and the proof that an exported level is the masked base model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.pruning.surgery import mask_model

# EXPORT.md rule 4: expected float32 difference of logits up to 32 in size, for whole kv groups and for heads that were
# rearranged, so that sums run in another order.
MAX_LOGIT_DIFFERENCE = 2e-4
MAX_LOGIT_DIFFERENCE_REARRANGED = 1e-3


@dataclass(frozen=True)
class ReloadProof:
    """Sliced checkpoint against masked dense model, both float32.

    Args:
        max_logit_difference: largest absolute difference of a logit.
        greedy_equal: the first ``greedy_tokens`` greedy tokens are the same, but for a tie: where they part, the
            masked model holds both tokens for equally likely, within the tolerance.
        num_tokens: tokens of the prompt that was compared.
        tolerance: of a logit.
        versions: of the libraries that loaded the level.
    """

    max_logit_difference: float
    greedy_equal: bool
    greedy_tokens: int
    num_tokens: int
    tolerance: float
    versions: Mapping[str, str]


def load_model(directory: Path, *, dtype: str, trust_remote_code: bool = False, device: str | None = None):  # type: ignore[no-untyped-def]
    """A causal language model in evaluation mode, parameters frozen.

    Args:
        directory: a Hugging Face directory.
        dtype: torch name of the type to hold weights in.
        trust_remote_code: run modelling code that the directory carries. Levels of this package need none: its
            classes are registered (`export.registered`).
        device: by default the accelerator, if there is one.
    """
    _know_levels(directory, trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{directory.name}: transformers cannot load this model: {error}") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False):  # type: ignore[no-untyped-def]
    """The tokenizer of a model directory.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    _know_levels(directory, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizers raise many types for a broken file
        raise InputError(f"the model has no tokenizer that transformers can load: {error}") from error


def _know_levels(directory: Path, trust_remote_code: bool) -> None:
    """Register this package's classes for a level that is loaded without code of its own.

    Not before it is needed: registered classes come before those of a directory, whatever it is trusted with.
    """
    config = directory / "config.json"
    if not trust_remote_code and config.is_file() and '"pruned_' in config.read_text():
        from gisp_tasks.export import registered

        registered.register()


def replace_weights(model: torch.nn.Module, replaced: Mapping[str, Path]) -> None:
    """Put the tensors of safetensors files, by name, in the place of a model's own."""
    for name, path in replaced.items():
        model.get_parameter(name).data.copy_(load_file(path)[name])


def prove_reload(
    base: Path,
    level: Path,
    *,
    geometry: Geometry,
    keep: KeepSets,
    prompt: list[int],
    greedy_tokens: int = 16,
    replaced: Mapping[str, Path] = MappingProxyType({}),
) -> ReloadProof:
    """Reload an exported level and compare it with the masked base model.

    Args:
        base: directory of the dense model.
        level: directory of the exported level.
        geometry: of the dense model.
        keep: what the level keeps.
        prompt: token ids to compare on.
        greedy_tokens: greedy tokens to compare after the prompt.
        replaced: as given to `write_checkpoint`; the masked model gets these weights too.

    Raises:
        NumericsError: they are not the same model.
    """
    ids = torch.tensor([prompt])
    masked = load_model(base, dtype="float32", device="cpu")
    replace_weights(masked, replaced)
    _round_weights(masked, _stored_dtype(level))
    mask_model(masked, geometry, keep)
    expected, expected_tokens = _logits_and_greedy(masked, ids, greedy_tokens)
    # As a user loads it who has nothing but the directory.
    sliced = load_model(level, dtype="float32", device="cpu", trust_remote_code=_carries_code(level))
    found, found_tokens = _logits_and_greedy(sliced, ids, greedy_tokens)
    difference = float((expected - found).abs().max())
    tolerance = MAX_LOGIT_DIFFERENCE_REARRANGED if geometry.separate_heads else MAX_LOGIT_DIFFERENCE
    proof = ReloadProof(
        max_logit_difference=difference,
        greedy_equal=_same_but_for_ties(masked, expected_tokens, found_tokens, 2 * tolerance),
        greedy_tokens=greedy_tokens,
        num_tokens=len(prompt),
        tolerance=tolerance,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    if not difference <= tolerance:
        raise NumericsError(
            f"the exported level is not the masked base model: logits differ by {difference:.3g}, allowed is "
            f"{tolerance:g}; it is not packaged"
        )
    if not proof.greedy_equal:
        raise NumericsError(
            f"the exported level is not the masked base model: of {greedy_tokens} greedy tokens some differ, although "
            f"logits of the prompt are within {difference:.3g}; it is not packaged"
        )
    return proof


def _carries_code(directory: Path) -> bool:
    return "auto_map" in json.loads((directory / "config.json").read_text())


def _same_but_for_ties(model: torch.nn.Module, expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> bool:
    """Whether two continuations [1, T] of one prompt are equal up to a place where ``model`` cannot tell them apart."""
    length = min(expected.shape[1], found.shape[1])
    parted = torch.nonzero(expected[0, :length] != found[0, :length])
    if not len(parted):
        return expected.shape == found.shape
    place = int(parted[0])
    with torch.inference_mode():
        logits = model(input_ids=expected[:, :place], use_cache=False).logits[0, -1]
    return bool((logits[expected[0, place]] - logits[found[0, place]]).abs() <= tolerance)


def _round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights as the level holds them, to be computed with in float32.

    `Module.to` would round the rotary frequencies too, which no checkpoint holds.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(torch.float32)


def _stored_dtype(directory: Path) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, json.loads((directory / "config.json").read_text())["dtype"])
    return dtype


def _logits_and_greedy(model: torch.nn.Module, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
        tokens = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return logits, tokens
