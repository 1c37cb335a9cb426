"""The page that people ask on, at `/`: files of this package, which hold no data and need no key."""

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from ..weights.demo import demo_model
from .gate import problem_response
from .problems import Problem

FOLDER = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}

# Everything comes from this server, and nothing is written into the page but by its own script.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked for with its ETag before it is used
}


class PageFiles:
    """Serves the page's files from memory, at `/` and `/page/{name}`."""

    def __init__(self) -> None:
        files = {file.name: file for file in FOLDER.iterdir() if file.suffix in KINDS}
        files["example.png"] = demo_model() / "sign.png"
        self._files = {name: (file.read_bytes(), KINDS[file.suffix]) for name, file in files.items()}

    async def send(self, request: Request) -> Response:
        """Send a file, or say that what the browser keeps of it is still right."""
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            return problem_response(Problem(404, f"the page has no file {name[:100]!r}; begin at /"))
        content, kind = self._files[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = HEADERS | {"ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)
