"""The JSON API under /api/v1; bearer tokens only."""

from worker.features.console.api.endpoints import BASE as BASE
from worker.features.console.api.endpoints import ENDPOINTS as ENDPOINTS
from worker.features.console.api.endpoints import LIST_ENDPOINTS as LIST_ENDPOINTS
from worker.features.console.api.server import Api as Api
