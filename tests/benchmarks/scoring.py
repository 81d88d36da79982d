"""What a scoring pass costs, as a ratio to a pass of the reference implementation's shape (`make benchmark`).

Both sides run interleaved in one process and are compared in CPU seconds; peak memory is that of a fresh process a
side. Both leave the layers alone that the published runs protect; the reference computes their gradients all the same.
The removals of both are compared too: a pass that saves work by computing something else would show there.
"""

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_pass import reference_pass
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_tasks.data import calibration, sources
from gisp_tasks.data.items import encode_pairs
from gisp_tasks.data.multiple_choice import questions
from gisp_tasks.demo import smollm2
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings, score
from gisp_tasks.pruning.objectives import CalibrationSet, margin
from gisp_tasks.pruning.ranking import Limits, limits_of, next_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.schedule import step_targets
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets, Removals
from gisp_tasks.pruning.surgery import mask_model, slice_model
from gisp_tasks.recipe import REFERENCE_PROTECT, CalibrationSection, ProtectSection
from gisp_tasks.tasks.score import peak_bytes

ROOT = Path(__file__).parents[2]
MIRROR = ROOT.parent / "shared" / "testdata" / "data"
MICRO_BATCH_TOKENS = 2048
LAST_LEVEL = 0.5
# The most that this package's pass may cost of the reference's.
TARGETS = {"perplexity": 0.85, "trajectory": 0.62, "arc_easy": 0.30, "boolq": 0.30, "hellaswag": 0.40}
SPLITS = {"arc_easy": "train", "boolq": "train_surrogate", "hellaswag": "train"}
OURS, REFERENCE, FISHER = "gisp", "reference", "gate_fisher"


class Bench:
    """One model, in the shapes of both sides, and the calibration set of a case.

    Args:
        options: of the command line.
        case: a key of `TARGETS`.
    """

    def __init__(self, options: argparse.Namespace, case: str) -> None:
        torch.set_num_threads(options.threads)
        self._path = options.model
        config = json.loads((self._path / "config.json").read_text())
        self.geometry: Geometry = geometry_of(config)
        self.limits: Limits = limits_of(ProtectSection(**REFERENCE_PROTECT), 32, self.geometry.num_layers)
        self.calibration = _calibration(options, case)
        self.targets = step_targets(options.steps, LAST_LEVEL)

    def load(self, side: str) -> Any:
        """The dense model in float32."""
        attention = "eager" if side == REFERENCE else "sdpa"
        return AutoModelForCausalLM.from_pretrained(
            self._path, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        ).eval()

    def models(self, *sides: str) -> dict[str, Any]:
        """The dense model of each side, after a pass over one group: what a process does once is not measured."""
        models = {side: self.load(side) for side in sides}
        for side, model in models.items():
            self._pass(side, model, KeepSets.everything(self.geometry), self.calibration.leading(1))
        return models

    def scores(self, side: str, model: Any, keep: KeepSets) -> StructureScores:
        """One scoring pass over the whole set."""
        return self._pass(side, model, keep, self.calibration)

    def _pass(self, side: str, model: Any, keep: KeepSets, calibration: CalibrationSet) -> StructureScores:
        if side == REFERENCE:
            return reference_pass(model, self.geometry, calibration)
        settings = ScoringSettings(
            self.limits.protected, "elements", MICRO_BATCH_TOKENS, score="taylor" if side == OURS else side
        )
        return score(model, keep, self.geometry, calibration, settings).scores

    def removals(self, scores: StructureScores, removed: Removals, target: float) -> Removals:
        """What goes next."""
        return next_removals(scores, removed, self.geometry, self.limits, target)


def _calibration(options: argparse.Namespace, case: str) -> CalibrationSet:
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    if case not in SPLITS:
        asked = CalibrationSection(
            dataset="wikitext2",
            split="validation",
            sequences=options.sequences,
            sequence_length=options.sequence_length,
        )
        return calibration.build(asked, tokenizer=tokenizer, vocab_size=len(tokenizer)).set
    source = sources.find(case, SPLITS[case])
    drawn = random.Random(0).sample(questions(case, source.rows(), origin=case), options.items)
    return margin([encode_pairs(tokenizer, question.pairs, question.correct) for question in drawn])


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def _agreement(ours: Removals, theirs: Removals) -> dict[str, Any]:
    """How far two lists of removals are the same."""
    lists = [np.stack([r.kinds, r.layers, r.indices], axis=1).tolist() for r in (ours, theirs)]
    common = len(set(map(tuple, lists[0])) & set(map(tuple, lists[1])))
    places = sum(a == b for a, b in zip(*lists, strict=False))
    return {
        "removals": len(ours),
        "removed_by_one_side_only": len(ours) + len(theirs) - 2 * common,
        "in_another_place": max(len(ours), len(theirs)) - places,
    }


def one_pass(bench: Bench, repetitions: int) -> dict[str, Any]:
    """Both sides, and the other score of this package, on the dense model, in turn."""
    everything = KeepSets.everything(bench.geometry)
    models = bench.models(REFERENCE, OURS, FISHER)
    seconds: dict[str, list[float]] = {side: [] for side in models}
    scores: dict[str, StructureScores] = {}
    for _ in range(repetitions):
        for side, model in models.items():
            took, scores[side] = _seconds(lambda side=side, model=model: bench.scores(side, model, everything))
            seconds[side].append(took)
    nothing = RemovalOrder.empty().removals
    found = {side: bench.removals(scores[side], nothing, bench.targets[0]) for side in (REFERENCE, OURS)}
    return {"seconds": seconds, "agreement": [_agreement(found[OURS], found[REFERENCE])]}


def trajectory(bench: Bench, repetitions: int) -> dict[str, Any]:
    """All steps to the last level, this package's model sliced, the reference's masked at its dense size."""
    seconds: dict[str, list[float]] = {REFERENCE: [], OURS: []}
    agreement: list[dict[str, Any]] = []
    for _ in range(repetitions):
        models = bench.models(REFERENCE, OURS)
        order, held = RemovalOrder.empty(), KeepSets.everything(bench.geometry)
        spent, agreement = dict.fromkeys(seconds, 0.0), []
        for step, target in enumerate(bench.targets, 1):
            keep = order.keep_sets(bench.geometry)
            mask_model(models[REFERENCE], bench.geometry, keep)
            slice_model(models[OURS], bench.geometry, now=held, wanted=keep)
            held, found = keep, {}
            for side, model in models.items():
                took, scores = _seconds(lambda side=side, model=model, keep=keep: bench.scores(side, model, keep))
                spent[side] += took
                found[side] = bench.removals(scores, order.removals, target)
            agreement.append(_agreement(found[OURS], found[REFERENCE]))
            order = order.extend(found[OURS], step)
        for side in seconds:
            seconds[side].append(spent[side])
    return {"seconds": seconds, "agreement": agreement}


def _peak_bytes(case: str, side: str) -> int:
    """Most memory that a fresh process has resident while it loads the dense model and does one pass."""
    command = [sys.executable, __file__, *sys.argv[1:], "--cases", case, "--peak", side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def measure(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """The record of one case."""
    bench = Bench(options, case)
    found = (trajectory if case == "trajectory" else one_pass)(bench, options.repetitions)
    seconds = found["seconds"]
    record = {
        "case": case,
        "sequences": bench.calibration.num_sequences,
        "groups": bench.calibration.num_groups,
        "tokens": len(bench.calibration.tokens),
        "ratio": {side: _ratio(seconds, side) for side in seconds if side != REFERENCE},
        "target": TARGETS[case],
        "cpu_seconds": seconds,
        "agreement": found["agreement"],
    }
    if case != "trajectory":  # its first step is the pass on the dense model
        record["peak_bytes"] = {side: _peak_bytes(case, side) for side in seconds}
    return record


def _ratio(seconds: dict[str, list[float]], side: str) -> dict[str, float]:
    ratios = [ours / theirs for ours, theirs in zip(seconds[side], seconds[REFERENCE], strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def _row(record: dict[str, Any]) -> list[str]:
    ratio, agreement = record["ratio"][OURS], record["agreement"]
    fisher, peaks = record["ratio"].get(FISHER), record.get("peak_bytes")
    removed, differing, moved = (
        sum(step[key] for step in agreement) for key in ("removals", "removed_by_one_side_only", "in_another_place")
    )
    return [
        record["case"],
        f"{record['groups']} / {record['tokens']:,}",
        f"{statistics.median(record['cpu_seconds'][REFERENCE]):.1f}",
        f"{statistics.median(record['cpu_seconds'][OURS]):.1f}",
        f"{ratio['median']:.3f} ({ratio['lowest']:.3f} to {ratio['highest']:.3f})",
        f"{record['target']:.2f} {'met' if ratio['median'] <= record['target'] else 'MISSED'}",
        f"{fisher['median']:.3f}" if fisher else "-",
        " / ".join(f"{peak / 2**30:.2f}" for peak in peaks.values()) if peaks else "-",
        f"{differing} / {moved} of {removed:,}",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face directory; by default the demo's SmolLM2-135M")
    parser.add_argument("--cases", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--sequences", type=int, default=8, help="WikiText-2 windows")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens a window")
    parser.add_argument("--items", type=int, default=12, help="questions a margin case")
    parser.add_argument("--steps", type=int, default=6, help="steps of the trajectory to 50 %%")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=Path("build/benchmark-scoring.json"))
    parser.add_argument("--peak", choices=[OURS, REFERENCE, FISHER], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    options = _options()
    logging.getLogger("gisp_tasks").setLevel(logging.WARNING)
    os.environ.setdefault("GISP_DATA_ROOT", str(MIRROR))
    options.model = options.model or smollm2.fetch(ROOT / "demo")
    if options.peak:
        bench = Bench(options, options.cases[0])
        bench.scores(options.peak, bench.load(options.peak), KeepSets.everything(bench.geometry))
        print(peak_bytes())
        return
    console = Console(width=180)
    table = Table(
        *("case", "groups / tokens", "reference, CPU s", "gisp, CPU s", "ratio (lowest to highest)", "at most"),
        *("ratio of gate-Fisher", "peak GiB, in that order", "removals: differ / moved"),
    )
    records = []
    for case in options.cases:
        records.append(measure(options, case))
        table.add_row(*_row(records[-1]))
    console.print(table)
    settings = {name: str(value) for name, value in vars(options).items() if name != "peak"}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "cases": records}, indent=1))
    console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()
