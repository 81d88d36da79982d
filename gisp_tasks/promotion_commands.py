"""The commands about champions: history, approve, rollback."""

import getpass
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gisp_tasks.errors import IntegrityError

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The registered model.", show_default=False)]
TrackingUri = Annotated[
    str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="The MLflow tracking server.", show_default=False)
]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.", show_default=False)]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who decides; by default the system's user.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, nothing else there.")]


def history(model: ModelName, tracking_uri: TrackingUri, as_json: AsJson = False) -> None:
    """Show who made which version champion, when and why, newest first.

    The registry and the runs' histories are compared; exit status 1 if they do not agree, or one was edited.
    """
    from gisp_tasks.tasks import champions

    found = champions.history(_registry(tracking_uri), model)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        console = Console()
        console.print(_versions_table(found))
        console.print(_events_table(found))
    if found["problems"]:
        raise IntegrityError("the history of this model is not whole:\n  " + "\n  ".join(found["problems"]))


def approve(
    model: ModelName,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="Its version to promote.", show_default=False)],
    reason: Reason,
    tracking_uri: TrackingUri,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Make a version that passed its gate the champion of its level."""
    from gisp_tasks.tasks import champions

    registry = _registry(tracking_uri)
    _say(champions.approve(registry, model, version, by=by or getpass.getuser(), reason=reason), as_json=as_json)


def rollback(
    model: ModelName,
    level: Annotated[str, typer.Argument(metavar="LEVEL", help="Name of the level, e.g. sp40.", show_default=False)],
    reason: Reason,
    tracking_uri: TrackingUri,
    to: Annotated[
        int | None, typer.Option(metavar="VERSION", help="By default the champion before the present one.")
    ] = None,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier champion of a level its champion again."""
    from gisp_tasks.tasks import champions

    registry, who = _registry(tracking_uri), by or getpass.getuser()
    _say(champions.roll_back(registry, model, level, to=to, by=who, reason=reason), as_json=as_json)


def _registry(tracking_uri: str) -> Any:
    from gisp_tasks.stores.registry import MlflowRegistry

    return MlflowRegistry.existing(tracking_uri)


def _say(outcome: dict[str, Any], *, as_json: bool) -> None:
    before = f"version {outcome['from_version']}" if outcome["from_version"] is not None else "none"
    line = f"{outcome['alias']} of {outcome['model_name']}: version {outcome['champion']} (before: {before})"
    sys.stdout.write((json.dumps(outcome, indent=1) if as_json else line) + "\n")


def _versions_table(found: dict[str, Any]) -> Table:
    table = Table("version", "level", "run", "gate", "state", title=found["model_name"], title_justify="left")
    for version in found["versions"]:
        table.add_row(*(str(version[name] or "-") for name in ("version", "level", "run_id", "gate", "state")))
    return table


def _events_table(found: dict[str, Any]) -> Table:
    table = Table("when (UTC)", "what", "level", "version", "by", "via", "why")
    for event in found["events"]:
        what = event["action"].replace("_", " ") + ("" if event["applied_at"] else " (not applied)")
        before = f"{event['from_version']} -> " if event["action"] in ("promoted", "rolled_back") else ""
        who = f"{event['by']}, to {', '.join(event['approvers'])}" if event["approvers"] else event["by"]
        when = event["at"][:19].replace("T", " ")
        table.add_row(when, what, event["level"], f"{before}{event['version']}", who, event["via"], event["reason"])
    return table
