"""Writing safetensors files one tensor at a time: memory is the largest tensor, not the model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to come: its name, its shape and how to make it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes it takes in ``dtype``."""
        return int(torch.Size(self.shape).numel()) * dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[TensorPlan], *, dtype: torch.dtype) -> None:
    """Write one file; the header's order, and so its bytes, is that of ``tensors``.

    The format: 8 bytes of header length (little endian), a JSON header padded with blanks to a multiple of 8,
    then the tensors' bytes end to end.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in tensors:
        end = offset + plan.num_bytes(dtype)
        header[plan.name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(plan.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for plan in tensors:
            tensor = plan.make().to(dtype).contiguous()
            assert tuple(tensor.shape) == plan.shape, f"{plan.name}: planned {plan.shape}, made {tuple(tensor.shape)}"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def shards(tensors: Sequence[TensorPlan], *, dtype: torch.dtype, max_bytes: int) -> list[list[TensorPlan]]:
    """Split into consecutive files of at most ``max_bytes`` (a larger tensor has a file of its own)."""
    files: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in tensors:
        size = plan.num_bytes(dtype)
        if files[-1] and filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(plan)
        filled += size
    return files
