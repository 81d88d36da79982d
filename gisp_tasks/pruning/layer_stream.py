"""Calibration sequences through the dense model layer by layer, watching what goes into single modules.

Between two layers only the hidden states of all sequences are held, so what an observer gathers of one layer can be
used and freed before the next one runs.

Shape legend: B sequences of a run, T tokens, D hidden, N tokens without padding, n inputs of a module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gisp_tasks.pruning.forward import device_of
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.rows import runs_of_like_length

Observer = Callable[[torch.Tensor, torch.Tensor], None]
"""Is given a module's inputs [N, n], padding left out, and the sequence that each token belongs to, int64 [N]."""


@dataclass
class _Rows:
    """Sequences that go through a layer together: their hidden states [B, T, D], and what else layers are given."""

    hidden: torch.Tensor
    arguments: list[dict[str, Any]]
    is_token: torch.Tensor
    sequences: torch.Tensor


class LayerStream:
    """All sequences, standing before one layer of the dense model.

    Args:
        model: a dense causal language model in evaluation mode.
        calibration: the sequences; weights are not read.
        batch_tokens: padded tokens that go through a layer at once (at least one sequence).
    """

    def __init__(self, model: nn.Module, calibration: CalibrationSet, *, batch_tokens: int) -> None:
        self._layers: Any = model.get_submodule("model.layers")
        lengths = (calibration.spans[:, 1] - calibration.spans[:, 0]).tolist()
        runs = runs_of_like_length(lengths, batch_tokens)
        self._rows = [_entrance(model, calibration, members) for members in runs]

    @torch.inference_mode()
    def advance(self, layer: int, observers: Mapping[str, Observer]) -> None:
        """Go through a layer, which must be the next one, with an observer on each of the modules named."""
        module = self._layers[layer]
        inputs: dict[str, torch.Tensor] = {}
        hooks = [module.get_submodule(path).register_forward_pre_hook(_keeper(inputs, path)) for path in observers]
        try:
            for rows in self._rows:
                rows.hidden = module(rows.hidden, **rows.arguments[layer])
                for path, observe in observers.items():
                    observe(inputs.pop(path)[rows.is_token], rows.sequences)
        finally:
            for hook in hooks:
                hook.remove()


def _keeper(inputs: dict[str, torch.Tensor], path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs[path] = arguments[0]

    return keep


class _Recorder(nn.Module):
    """Stands in for a layer, to see what the model hands to it."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden


@torch.inference_mode()
def _entrance(model: nn.Module, calibration: CalibrationSet, members: list[int]) -> _Rows:
    """Embeddings of some sequences, and the masks and positions that each layer would be given."""
    decoder: Any = model.get_submodule("model")
    device = device_of(model)
    lengths = torch.from_numpy(calibration.spans[members, 1] - calibration.spans[members, 0])
    tokens = torch.zeros(len(members), int(lengths.max()), dtype=torch.int64)
    for row, member in enumerate(members):
        start, end = calibration.spans[member]
        tokens[row, : end - start] = torch.from_numpy(calibration.tokens[start:end].astype("int64"))
    tokens = tokens.to(device)
    is_token = torch.arange(tokens.shape[1]) < lengths[:, None]
    layers, recorders = decoder.layers, [_Recorder() for _ in decoder.layers]
    decoder.layers = nn.ModuleList(recorders)
    try:
        decoder(input_ids=tokens, use_cache=False)
    finally:
        decoder.layers = layers
    return _Rows(
        hidden=decoder.embed_tokens(tokens),
        arguments=[recorder.arguments for recorder in recorders],
        is_token=is_token.to(device),
        sequences=torch.tensor(members).repeat_interleave(lengths).to(device),
    )
