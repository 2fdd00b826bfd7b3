"""The coordinator's Flower app, as a table of contents.

A run joins its settings into a plan (`common.settings.compose`), opens its journal and goes on after the last done
round (`server.records.journal`), leaves out who has left for good (`server.sites.departures`), waits for the hospitals
(`server.sites.enrolment`), and then, round by round (`server.federation`): sends the global model and the global
prototypes to the training sites (`server.sites.requests`, `server.sites.exchange`), admits or rejects what they send
(`server.admission`), merges weights and class statistics (`server.aggregation.merge`), remembers prototypes
(`server.aggregation.prototypes`), and commits. At the end it chooses a model without looking at the held-out hospital
(`server.selection`), has it judged there, and writes the results (`server.records.results`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import FedsgcgError
from common.settings.flower_run import plan_of_run
from common.settings.plan import Plan
from server.federation import Outcome, run_federation
from server.records.events import OnEvent, ignore_event

LOG = logging.getLogger("flwr")  # Flower's own logger: `flwr run --stream` shows it


def build_server_app(
    tree: Mapping[str, Any] | None = None, on_event: OnEvent = ignore_event
) -> ServerApp:
    """Build the coordinator's app.

    Args:
        tree: Resolved settings; None reads Flower's run config (`config-json` or `overrides`).
        on_event: Called with every event of the run.

    Returns:
        The app. Its main raises FedsgcgError when the run fails, so that Flower reports the failure too.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        plan = plan_of_run(tree, dict(context.run_config), context.run_id)
        # A failure is raised and not logged as well: Flower prints what an app raises.
        report_outcome(run_federation(grid, plan, on_event), plan)

    return app


def report_outcome(outcome: Outcome, plan: Plan) -> None:
    """Say where the results are; raises FedsgcgError for a run that failed."""
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
