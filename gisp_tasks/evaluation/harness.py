"""Exact match on word problems through lm-eval, from local files and without the network.

The task is lm-eval's own ``gsm8k``: its prompt, answer filters, scoring and version. Only the rows come from
our files. They are handed over in memory, so no cache of data sets can hold those of an earlier run.
"""

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.tasks
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gisp_tasks.errors import InputError
from gisp_tasks.recipe import ProblemEvaluation
from gisp_tasks.refs import sha256_file

logger = logging.getLogger(__name__)

# Each problem draws its own solved examples from the train file; lm-eval's own default seed.
FEWSHOT_SEED = 1234
_SCHEMA = pa.schema({"question": pa.string(), "answer": pa.string()})
_METRIC_OF_FILTER = {"strict-match": "exact_match_strict", "flexible-extract": "exact_match_flexible"}


@dataclass(frozen=True)
class ProblemFiles:
    """Word problems in GSM8K's schema (``question``, ``answer`` that ends in ``#### number``).

    Args:
        train: where the solved examples come from, .parquet or .jsonl.
        test: the problems to solve, .parquet or .jsonl.
    """

    train: Path
    test: Path


@dataclass(frozen=True)
class HarnessResult:
    """What lm-eval measured, and how.

    Args:
        metrics: ``<name>_exact_match_strict`` and ``_flexible`` (fractions), and their standard errors with the
            ending ``_stderr`` (left out for a single problem, which has none).
        protocol: everything the metrics depend on besides the model; ready for JSON.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]


def exact_match(
    model: Any, tokenizer: Any, *, files: ProblemFiles, section: ProblemEvaluation, name: str = "gsm8k"
) -> HarnessResult:
    """Let the model solve the problems by greedy decoding and count the right answers.

    A prompt that leaves no room for the answer in the model's context is cut from the left, as lm-eval does:
    the first solved examples go. The number of such prompts is recorded and logged.

    Args:
        model: a causal language model of transformers; it is put into evaluation mode.
        tokenizer: its tokenizer; not changed.
        files: the problems and the solved examples.
        section: shots, limit, batch size and longest answer.
        name: prefix of the metrics, and the task's name in lm-eval.

    Raises:
        InputError: a file is missing, is not in GSM8K's schema or has too few rows, or the longest answer does
            not fit into the model's context.
    """
    rows = datasets.DatasetDict({"train": _read(files.train), "test": _read(files.test)})
    _check_shots(rows["train"].num_rows, section.shots, files.train)
    with _quiet_lm_eval():
        # lm-eval gives a tokenizer without a pad token one; the caller's stays as it is.
        lm = _QuietLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=section.batch_size)
        _check_answer_fits(lm.max_length, section.max_new_tokens)
        loaded = TaskManager(include_defaults=False).load([_task_config(rows, section, name)])
        task = loaded["tasks"][name]
        task.set_fewshot_seed(FEWSHOT_SEED)
        # `evaluate`, not `simple_evaluate`: the latter asks the hub for the model's commit and runs git and pip.
        results = lm_eval.evaluate(lm, loaded, limit=section.limit, log_samples=False)
    num_cut = _num_cut_prompts(lm, task, section)
    protocol = {
        "harness": f"lm-eval {lm_eval.__version__}",
        "task": name,
        "task_version": results["versions"][name],
        "shots": section.shots,
        "num_samples": results["n-samples"][name]["effective"],
        "limit": section.limit,
        "batch_size": section.batch_size,
        "max_new_tokens": section.max_new_tokens,
        "context": lm.max_length,
        "num_cut_prompts": num_cut,
        "problems": {"file": files.test.name, "sha256": sha256_file(files.test)},
        "fewshot_source": {
            "file": files.train.name,
            "sha256": sha256_file(files.train),
            "seed": FEWSHOT_SEED,
        },
        "filters": {metric: filter_name for filter_name, metric in _METRIC_OF_FILTER.items()},
        "generation": {key: task.config.generation_kwargs[key] for key in ("do_sample", "until")},
    }
    return HarnessResult(_metrics(results["results"][name], name), protocol)


def _task_config(rows: datasets.DatasetDict, section: ProblemEvaluation, name: str) -> dict[str, Any]:
    """lm-eval's ``gsm8k`` with our rows, name, shots and longest answer."""
    builtin = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    config: dict[str, Any] = yaml.safe_load(builtin.read_text(encoding="utf-8"))

    def our_rows(**_: Any) -> datasets.DatasetDict:
        return rows

    for key in ("dataset_path", "dataset_name"):
        del config[key]
    generation = config["generation_kwargs"] | {"max_gen_toks": section.max_new_tokens}
    return config | {
        "task": name,
        "custom_dataset": our_rows,
        "num_fewshot": section.shots,
        "generation_kwargs": generation,
    }


def _read(path: Path) -> datasets.Dataset:
    """The questions and answers of a file."""
    if not path.is_file():
        raise InputError(f"word problems {path}: no such file. Give the path of a .parquet or .jsonl file")
    try:
        table = _READERS[path.suffix](path).select(_SCHEMA.names).cast(_SCHEMA)
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"word problems {path}: not readable ({' '.join(str(error).split())}). A .parquet or .jsonl file is "
            f"needed whose rows have the texts `question` and `answer`, as in GSM8K"
        ) from None
    num_incomplete = sum(column.null_count for column in table.columns)
    if table.num_rows == 0 or num_incomplete:
        raise InputError(
            f"word problems {path}: {table.num_rows} rows, in which {num_incomplete} texts are missing. At least "
            f"one row is needed, and each with the texts `question` and `answer`; repair the file"
        )
    return datasets.Dataset(table)


def _read_jsonl(path: Path) -> pa.Table:
    # With a given schema nothing is guessed: a number or a date inside quotes stays a text.
    options = pyarrow.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")
    return pyarrow.json.read_json(path, parse_options=options)


_READERS: dict[str, Callable[[Path], pa.Table]] = {".parquet": pyarrow.parquet.read_table, ".jsonl": _read_jsonl}


def _check_shots(num_train: int, shots: int, path: Path) -> None:
    if shots > num_train:
        raise InputError(
            f"shots={shots} solved examples were asked for, and {path} has {num_train}. "
            f"Lower shots to at most {num_train}, or give a file with more rows"
        )


def _check_answer_fits(context: int, max_new_tokens: int) -> None:
    if max_new_tokens >= context:
        raise InputError(
            f"max_new_tokens={max_new_tokens} was asked for, and the model's context has {context} tokens, which "
            f"hold the question too. Lower max_new_tokens well below {context}"
        )


def _num_cut_prompts(lm: Any, task: Any, section: ProblemEvaluation) -> int:
    """How many prompts lm-eval had to cut; said aloud when there are any."""
    room = lm.max_length - section.max_new_tokens
    prompts = [instance.args[0] for instance in task.instances]
    num_cut: int = sum(lm.tok_batch_encode([prompt])[0].shape[1] > room for prompt in prompts)
    if num_cut:
        logger.warning(
            "%s: %d of %d prompts were cut from the left: the model's context of %d tokens has no room for "
            "%d shots, the question and an answer of %d tokens",
            task.config.task,
            num_cut,
            len(prompts),
            lm.max_length,
            section.shots,
            section.max_new_tokens,
        )
    return num_cut


def _metrics(scores: dict[str, Any], name: str) -> dict[str, float]:
    metrics = {}
    for filter_name, metric in _METRIC_OF_FILTER.items():
        metrics[f"{name}_{metric}"] = float(scores[f"exact_match,{filter_name}"])
        stderr = scores[f"exact_match_stderr,{filter_name}"]
        # lm-eval writes "N/A" for a single problem.
        if not isinstance(stderr, str) and math.isfinite(stderr):
            metrics[f"{name}_{metric}_stderr"] = float(stderr)
    return metrics


class _QuietLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """HFLM without the progress bar."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As in HFLM."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Without lm-eval's log below errors, and the progress bar that it does not let a caller turn off."""
    parent, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    bar = lm_eval.api.task.tqdm
    parent.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        parent.setLevel(level)
        lm_eval.api.task.tqdm = bar
