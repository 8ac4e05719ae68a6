"""Context factory: builds what a handler's context needs from its work, and validates params and settings."""

from __future__ import annotations

import logging
from typing import Any

from worker.clock import Clock
from worker.execution.runners.contract import Work
from worker.handlers.context import Given, HeldToken, Org, ThisRun
from worker.handlers.job import Job
from worker.handlers.models import read_params, read_settings


def given_for(work: Work, job: Job, log: logging.Logger, clock: Clock) -> Given[Any, Any]:
    """What the handler is given.

    Raises:
        ParamsInvalid, SettingsInvalid: it is not called.
    """
    return Given(
        org=Org(work.org_code, work.org_name),
        run=ThisRun(work.run_id, work.scheduled_for, work.attempt, work.fencing_token, work.idempotency_key),
        params=read_params(job, work.params),
        settings=read_settings(job, work.claims.properties),
        checkpoint=work.checkpoint,
        deadline=work.timeout_at,
        api_origins=work.api_origins,
        log=log,
        held=HeldToken(work.token, work.claims, clock),
        traceparent=work.traceparent,
        private_origins=work.private_origins,
        insecure_origins=work.insecure_origins,
    )
