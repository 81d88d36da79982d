"""The run's page: one self-contained HTML file, a pure function of what the run recorded."""

from gisp_tasks.report.metrics import gate_value, metric_names
from gisp_tasks.report.page import render
from gisp_tasks.report.places import Places
from gisp_tasks.report.trajectory import ScoreSummary, StepObservation, Trajectory, summarise_scores

__all__ = [
    "Places",
    "ScoreSummary",
    "StepObservation",
    "Trajectory",
    "gate_value",
    "metric_names",
    "render",
    "summarise_scores",
]
