"""The coordinator's Flower app, and an overview of a run.

1. The settings become a plan (`common.settings.compose`).
2. The journal is opened; a run resumes after its last committed round (`server.records.journal`).
3. Departed sites are left out (`server.sites.departures`).
4. The sites enrol (`server.sites.enrolment`).
5. In every round (`server.federation`), the training sites receive the global model and prototypes
   (`server.sites.requests`, `server.sites.exchange`), their replies are admitted or rejected
   (`server.admission`), weights and class statistics are merged (`server.aggregation.fedavg`,
   `server.aggregation.class_statistics`), the prototypes are updated
   (`server.aggregation.prototypes`), and the round is committed.
6. A model is selected without looking at the held-out site (`server.selection`), evaluated there,
   and the results are written (`server.records.results`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.flower_run import plan_of_run
from fedsgcg.common.settings.plan import Plan
from fedsgcg.server.federation import Outcome, run_federation
from fedsgcg.server.records.events import OnEvent, ignore_event
from fedsgcg.server.sites.receipts import with_receipts

LOG = logging.getLogger("flwr")  # Flower's own logger: `flwr run --stream` shows it


def build_server_app(
    tree: Mapping[str, Any] | None = None, on_event: OnEvent = ignore_event
) -> ServerApp:
    """Build the coordinator's app.

    Args:
        tree: Resolved settings; None reads Flower's run config (`config-json` or `overrides`).
        on_event: Called with every event of the run.

    Returns:
        The app. Its main function raises FedsgcgError when the run fails, so that Flower reports
        the failure too.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        plan = plan_of_run(tree, dict(context.run_config), context.run_id)
        # A failure is raised but not logged: Flower prints what an app raises.
        report_outcome(run_federation(with_receipts(grid), plan, on_event), plan)

    return app


def report_outcome(outcome: Outcome, plan: Plan) -> None:
    """Log where the results are; raises FedsgcgError for a run that failed."""
    if outcome.failure:
        raise FedsgcgError(*outcome.failure)
    for problem in outcome.problems:
        LOG.warning("%s", problem)
    LOG.info(
        "fedsgcg: %s after %d rounds, results in %s",
        outcome.status,
        outcome.rounds_done,
        plan.output,
    )


app = build_server_app()
