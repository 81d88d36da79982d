"""One scoring pass on the accelerator: base weights sliced by the order so far, gradients, scores."""

import logging
import resource
import sys
import time
from pathlib import Path

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores import model_source
from gisp_tasks.stores.environment import computed_on
from gisp_tasks.tasks.runtime import Json, Run, make_torch_deterministic, scratch

logger = logging.getLogger(__name__)


def score(recipe: Json, run: Json, step: int, order: Json | None) -> Json:
    """Publish ``steps/<step>/scores.safetensors``.

    Args:
        recipe: as data.
        run: reference of the plan.
        step: from 1.
        order: reference of the removal order after the step before; None for the first.
    """
    this = Run.open(recipe, run)
    if done := this.store.stat(Keys.step(step, "scores.safetensors")):
        return done.to_dict()
    before = load_order(this, ArtifactRef.from_dict(order)) if order else RemovalOrder.empty()
    return Scorer(this).score(step, before).to_dict()


def load_order(run: Run, ref: ArtifactRef) -> RemovalOrder:
    """A published removal order."""
    with scratch() as directory:
        return RemovalOrder.load(run.store.fetch(ref, directory / "removal_order.safetensors"))[0]


class Scorer:
    """A model on the device and its calibration set, held over consecutive steps.

    Slicing is incremental: the weights of a kept structure are the same whether it was cut free in one step or
    in ten, so scores do not depend on how steps are grouped into tasks.
    """

    def __init__(self, run: Run) -> None:
        from gisp_tasks.export.reload import load_model

        make_torch_deterministic()
        self._run = run
        directory = model_source.locate(run.model)
        remote_code = run.recipe.model.trust_remote_code
        self._model = load_model(directory, dtype=run.recipe.model.dtype, trust_remote_code=remote_code)
        self._held = KeepSets.everything(run.geometry)
        self._calibration = run.calibration()

    def score(self, step: int, order: RemovalOrder) -> ArtifactRef:
        """Score what ``order`` leaves, and publish."""
        from gisp_tasks.pruning import importance
        from gisp_tasks.pruning.surgery import slice_model

        run, began = self._run, time.monotonic()
        keep = order.keep_sets(run.geometry)
        slice_model(self._model, run.geometry, now=self._held, wanted=keep)
        self._held = keep
        asked = run.recipe.importance
        settings = importance.ScoringSettings(
            run.limits.protected, asked.normaliser, run.plan.micro_batch_tokens, score=asked.score
        )
        result = importance.score(self._model, keep, run.geometry, self._calibration, settings)
        took = time.monotonic() - began
        logger.info("Step %d: objective %.5f, %.1f s", step, result.objective, took)
        metadata = {
            "step": step,
            "objective": result.objective,
            "micro_batch_tokens": result.micro_batch_tokens,
            "score": run.recipe.importance.score,
            "normaliser": run.recipe.importance.normaliser,
            "run_id": run.run_id,
        }
        with scratch() as directory:
            path = directory / "scores.safetensors"
            result.scores.save(path, metadata)
            observed = {"seconds": took, "peak_bytes": peak_bytes(), "computed_on": computed_on()}
            run.publish_observation(Keys.step(step, "timing.json"), observed)
            return run.store.put(Keys.step(step, "scores.safetensors"), path)


def peak_bytes() -> int:
    """Most memory held so far: of the accelerator if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # Not ru_maxrss, which a process on Linux begins with at what its parent held.
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
