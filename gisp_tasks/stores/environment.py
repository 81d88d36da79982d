"""What numbers depend on besides their inputs: versions, hardware, the settings of torch."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import gisp_tasks
from gisp_tasks.refs import DirectoryListing, sha256_bytes, sha256_file

_PACKAGES = (
    *("apache-airflow", "torch", "transformers", "tokenizers", "accelerate", "datasets", "lm-eval", "safetensors"),
    *("numpy", "scipy", "pyarrow", "boto3", "mlflow", "pydantic", "huggingface-hub"),
)


def environment() -> dict[str, Any]:
    """Versions and hardware of this process."""
    import torch

    return {
        "package": gisp_tasks.__version__,
        "package_sha256": package_digest(),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }


def computed_on() -> dict[str, Any]:
    """Hardware, and the settings of torch as they are now: what the last bits of a score may depend on."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "cpu": cpu_model(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "package_sha256": package_digest(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG") if on_gpu else None,
        "seed": torch.initial_seed(),
    }


def cpu_model() -> str:
    """The processor's name, as its maker calls it where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def package_digest() -> str:
    """Hex sha256 over this package's Python files, by name and digest: what a version number may not tell."""
    root = Path(gisp_tasks.__file__).parent
    files = {
        path.relative_to(root).as_posix(): (sha256_file(path), path.stat().st_size)
        for path in sorted(root.rglob("*.py"))
    }
    return sha256_bytes(DirectoryListing(files).to_bytes())
