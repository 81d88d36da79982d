"""lm-eval's own tasks on rows of ours: from memory, without the network, and without noise.

A task's prompt, choices, filters, scoring and version are lm-eval's; only the rows are given. They are handed over in
memory, so no cache of data sets can hold those of an earlier run.
"""

import copy
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

# Not in lm-eval's public surface, which cannot change a task of its own that is read from a file.
from lm_eval.tasks._yaml_loader import load_yaml

from gisp_tasks.errors import InputError

# Each question draws its own solved examples; lm-eval's own default seed.
FEWSHOT_SEED = 1234
HARNESS = f"lm-eval {lm_eval.__version__}"
_EVALUATED, _EXAMPLES = "evaluated", "examples"


@dataclass(frozen=True)
class TaskRows:
    """Rows of a task, with the columns that lm-eval's task reads.

    Args:
        evaluated: the questions asked, in order.
        examples: where solved examples come from; not read without shots.
    """

    evaluated: Sequence[Mapping[str, Any]]
    examples: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class HarnessResult:
    """What lm-eval measured, and how.

    Args:
        metrics: fractions by name; a standard error has the ending ``_stderr``, and is left out for a single question,
            which has none.
        protocol: everything the metrics depend on besides the model and the data; ready for JSON.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]


@dataclass(frozen=True)
class TaskRun:
    """One task of lm-eval that has run.

    Args:
        task: lm-eval's object; its ``instances`` hold what was asked and answered.
        scores: by ``metric,filter``.
        protocol: harness, task, version, shots and number of samples.
    """

    task: Any
    scores: dict[str, Any]
    protocol: dict[str, Any]

    def metric(self, key: str, name: str) -> dict[str, float]:
        """The score ``key`` under our ``name``, and its standard error where there is one."""
        metric, filter_name = key.split(",")
        found = {name: float(self.scores[key])}
        stderr = self.scores[f"{metric}_stderr,{filter_name}"]
        # lm-eval writes "N/A" for a single question.
        if not isinstance(stderr, str) and math.isfinite(stderr):
            found[f"{name}_stderr"] = float(stderr)
        return found


def language_model(model: Any, tokenizer: Any, *, batch_size: int) -> Any:
    """lm-eval's view of a model; the caller's tokenizer is not changed.

    Args:
        model: a causal language model of transformers; it is put into evaluation mode.
        tokenizer: its tokenizer.
        batch_size: sequences that go through the model at once.
    """
    with _quiet():
        # lm-eval gives a tokenizer without a pad token one; the caller's stays as it is.
        return _QuietLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def run_task(
    lm: Any, config_file: str, *, rows: TaskRows, shots: int, generation: Mapping[str, Any] | None = None
) -> TaskRun:
    """Run a task that lm-eval ships on the given rows.

    Args:
        lm: from `language_model`.
        config_file: the task's file below lm-eval's folder of tasks.
        rows: the questions, and the examples.
        shots: solved examples before each question.
        generation: settings of the decoding beside the task's own, for a task whose answers are generated.

    Raises:
        InputError: no question, or fewer examples than shots.
    """
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / config_file)
    name = config["task"]
    _check(name, rows, shots)
    splits = {_EVALUATED: datasets.Dataset.from_list([dict(row) for row in rows.evaluated])}
    if shots:
        splits[_EXAMPLES] = datasets.Dataset.from_list([dict(row) for row in rows.examples])
    examples = _EXAMPLES if shots else None

    def our_rows(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(splits)

    config |= {
        "custom_dataset": our_rows,
        "training_split": examples,
        "validation_split": None,
        "test_split": _EVALUATED,
        "fewshot_split": examples,
        "num_fewshot": shots,
    }
    if generation:
        config["generation_kwargs"] = config["generation_kwargs"] | generation
    with _quiet():
        loaded = TaskManager(include_defaults=False).load([config])
        task = loaded["tasks"][name]
        task.set_fewshot_seed(FEWSHOT_SEED)
        # `evaluate`, not `simple_evaluate`: the latter asks the hub for the model's commit and runs git and pip.
        results = lm_eval.evaluate(lm, loaded, log_samples=False)
    protocol = {
        "harness": HARNESS,
        "task": name,
        "task_version": results["versions"][name],
        "shots": shots,
        "fewshot_seed": FEWSHOT_SEED if shots else None,
        "num_samples": results["n-samples"][name]["effective"],
    }
    return TaskRun(task, results["results"][name], protocol)


def num_longer(lm: Any, texts: Iterable[str], *, room: int) -> int:
    """How many texts have more than ``room`` tokens, with the tokens that the tokenizer adds to a text."""
    return sum(len(lm.tok_encode(text)) > room for text in texts)


def _check(name: str, rows: TaskRows, shots: int) -> None:
    if not rows.evaluated:
        raise InputError(f"{name}: no rows were found. At least one question is needed; use a file that has some")
    if shots > len(rows.examples):
        raise InputError(
            f"{name}: shots={shots} solved examples were asked for, and there are {len(rows.examples)}. "
            f"Lower shots to at most {len(rows.examples)}, or give a file with more rows"
        )


class _QuietLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """HFLM without progress bars."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As in HFLM."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As in HFLM."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log below errors, and the progress bars that it does not let a caller turn off."""
    parent, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    bar = lm_eval.api.task.tqdm
    bars = not datasets.are_progress_bars_disabled()
    parent.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        parent.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
