"""The JSON API under /api/v1; bearer tokens only."""

from worker.web.api.endpoints import BASE as BASE
from worker.web.api.endpoints import ENDPOINTS as ENDPOINTS
from worker.web.api.endpoints import LIST_ENDPOINTS as LIST_ENDPOINTS
from worker.web.api.server import Api as Api
