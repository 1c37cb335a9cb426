"""What can be read without asking the model: which model it is, whether it works, and how much it has done."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..inference.options import forcible
from .asking import unknown_model
from .gate import problem_response
from .metrics import exposition
from .openapi import description
from .service import Service

EXPOSITION = "text/plain; version=0.0.4"  # the content type of Prometheus' text format


@dataclass(frozen=True)
class Pages:
    """The endpoints of GET."""

    service: Service

    async def models(self, request: Request) -> Response:
        """The one model that there is, as a list."""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        asked, served = request.path_params["name"], self.service.options.name
        return JSONResponse(self._model) if asked == served else problem_response(unknown_model(asked, served))

    async def health(self, request: Request) -> Response:
        """Whether the engine works: 200, or 503 while it stops, stands or is dead."""
        found = self.service.standing()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """Counters and gauges for Prometheus."""
        service = self.service
        text = exposition(service.engine.snapshot(), service.answered, service.intake.requests)
        return PlainTextResponse(text, media_type=EXPOSITION)

    async def openapi(self, request: Request) -> Response:
        """The description of all endpoints."""
        return JSONResponse(description(self.service.options.name, forcible(self.service.engine.config)))

    @cached_property
    def _model(self) -> dict[str, Any]:
        config = self.service.engine.config
        told = {"granularities": sorted(config.granularities), "router": config.has_router}
        told |= {"context_length": config.context_length}
        head = {"id": self.service.options.name, "object": "model", "created": self.service.created}
        return {**head, "owned_by": "avg-mlx", "avg": told}
