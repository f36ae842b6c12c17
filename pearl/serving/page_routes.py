"""GET /: a page to try the model with. It is static and loads nothing from elsewhere; it asks the API as any client."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

# By path; relative to "/" in the page's own words, so that it works behind a proxy's prefix too.
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/answer.js": ("answer.js", "text/javascript; charset=utf-8"),
    "/page/race.js": ("race.js", "text/javascript; charset=utf-8"),
    "/page/timeline.js": ("timeline.js", "text/javascript; charset=utf-8"),
    "/page/events.js": ("events.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_PATHS = tuple(_FILES)  # open to everyone: nothing in them is the model's or a client's
_HEADERS = {
    # Text of a model or a client could not run as a script even if the page put it in the wrong place.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Reads the files once. They are no part of the API's document."""
    folder = files("pearl.serving") / "page"
    for path, (name, media_type) in _FILES.items():
        _add(app, path, (folder / name).read_bytes(), media_type)


def _add(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def page_file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)
