"""The person in the loop: the Airflow task that asks whether a level becomes champion, and reads the answer."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator, HITLOperator
from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowSkipException

from gisp_tasks.recipe import PromotionSection

Json = dict[str, Any]

WAIT = "wait_for_approval"
"""Parameter of a DAG run: false where nobody is there to answer."""


class LevelApproval(ApprovalOperator):
    """Asks the approvers whether a level becomes champion, and waits for the answer without a worker.

    It is skipped, and with it the promotion, when there is nothing to ask (the level missed its gate, or is champion)
    or when the DAG run says that nobody is there; the request then waits for `gisp approve`. No answer in time counts
    as a rejection; an answer that is lost with its worker is asked for again. Any answer is handed to the next task,
    which enters it in the history: unlike its base class, this one does not skip what follows a rejection.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: reference of ``level.json``.
        promotion: who is asked, and for how long.
        **kwargs: of every operator.
    """

    template_fields: Sequence[str] = (*ApprovalOperator.template_fields, "plan_ref", "level_ref")

    def __init__(self, *, recipe: Json, run: Any, level: Any, promotion: PromotionSection, **kwargs: Any) -> None:
        # Of the question's form; Airflow adds the DAG's own parameters to ``kwargs``, which are none of it.
        kwargs["params"] = {"reason": Param("", type="string", maxLength=500, description="Why; kept in the history")}
        super().__init__(
            subject="Promote this level?",
            defaults=self.REJECT,
            assigned_users=[{"id": name, "name": name} for name in promotion.approvers],
            response_timeout=timedelta(hours=promotion.timeout_hours),
            **kwargs,
        )
        self.recipe = recipe
        self.plan_ref = run
        self.level_ref = level

    def execute(self, context: Any) -> Any:
        """Enter the request, and ask."""
        from gisp_tasks.tasks.promote import request

        question = request(self.recipe, self.plan_ref, self.level_ref)
        if question is None:
            raise AirflowSkipException("nothing to ask: the level missed its gate, or is champion")
        if not context["params"][WAIT]:
            raise AirflowSkipException("nobody is there to answer: the request waits for `gisp approve`")
        self.subject, self.body = question["subject"], question["body"]
        return super().execute(context)

    def execute_complete(self, context: Any, event: Mapping[str, Any]) -> Json:
        """The answer, for `gisp_tasks.tasks.promote.promote`."""
        response = HITLOperator.execute_complete(self, context, dict(event))
        user = response["responded_by_user"] or {}
        at = response["responded_at"].isoformat(timespec="milliseconds")
        task = context["ti"]
        return {
            # With the time, so that a task that is cleared asks anew, and one that is tried again answers the same.
            "key": f"airflow/{task.dag_id}/{task.run_id}/{task.task_id}/{at}",
            "at": at,
            "approved": response["chosen_options"] == [self.APPROVE],
            "by": list(dict.fromkeys(user[name] for name in ("id", "name") if user.get(name))),
            "reason": response["params_input"].get("reason"),
        }
