"""The table of the API, and what is generated from it: the page /docs and /openapi.json."""

import html
from typing import Any, NamedTuple

from clipvip import __version__


class Parameter(NamedTuple):
    """One value that a request gives. kind: its type in JSON schema."""

    name: str
    kind: str
    text: str
    required: bool = False
    place: str = "query"


class ApiRoute(NamedTuple):
    """One method of one path. handler: the name of a method of clipvip.serve.app.App.

    body: types and description of what a request carries; None for nothing.
    returns: type and description of the answer.
    """

    method: str
    path: str
    handler: str
    summary: str
    parameters: tuple[Parameter, ...]
    returns: tuple[str, str]
    body: tuple[tuple[str, ...], str] | None = None
    errors: tuple[int, ...] = (400, 403, 503)


ID = Parameter("id", "string", "A moment's id, 16 hexadecimal digits.", True, "path")
FILTERS = (
    Parameter("k", "integer", "Number of hits, 1 to 200; by default 24."),
    Parameter("folder", "string", "Only files in this folder and below; an absolute path."),
    Parameter("min_duration", "number", "Only files of at least this many seconds."),
    Parameter("max_duration", "number", "Only files of at most this many seconds."),
    Parameter("after", "string", "Only files recorded on this day or later, such as 2024-05-01."),
    Parameter("before", "string", "Only files recorded before this day."),
)
JSON = "application/json"
HITS = (
    JSON,
    "{hits: […], seconds}. A hit is what `clipvip search --json` prints (score, path, start, end, "
    "from, to, id, duration, date, caption), and name and folder as text that is safe to show, "
    "image (whether the file is one) and film (start and end of the film under /api/clip). "
    "caption is null for a moment without one, and is safe to show as text too.",
)
ROUTES = (
    ApiRoute(
        "GET",
        "/api/search",
        "search",
        "Find the moments that match a sentence, best first.",
        (Parameter("q", "string", "The sentence, at most 1000 characters.", True), *FILTERS),
        HITS,
    ),
    ApiRoute(
        "POST",
        "/api/search",
        "search_by_upload",
        "Find the moments that look like an image or a video.",
        FILTERS,
        HITS,
        (
            ("image/*", "video/*", "application/octet-stream"),
            "The image or video itself, at most 64 MB. It is deleted after the search.",
        ),
        (400, 403, 408, 413, 415, 503),
    ),
    ApiRoute(
        "GET",
        "/api/like/{id}",
        "like",
        "Find the moments that look like one of the index.",
        (ID, *FILTERS),
        HITS,
        errors=(400, 403, 404, 503),
    ),
    ApiRoute(
        "GET",
        "/api/index",
        "about",
        "Describe the index.",
        (),
        (
            JSON,
            "{index, model, moments, captions, videos, seconds, sources, folders, can_add}. "
            "captions is the number of moments that have one, seconds the length of all videos. A "
            "folder has text to show, and the query that selects it.",
        ),
    ),
    ApiRoute(
        "GET",
        "/api/videos",
        "videos",
        "List the files of the index, the newest first.",
        (
            Parameter("offset", "integer", "Number of files to skip; by default 0."),
            Parameter("limit", "integer", "Number of files, 1 to 1000; by default 100."),
            *FILTERS[1:],
        ),
        (JSON, "{videos: [{path, name, folder, size, duration, date}], total}."),
    ),
    ApiRoute(
        "GET",
        "/api/thumbnail/{id}.jpg",
        "thumbnail",
        "Show a picture of a moment.",
        (ID, Parameter("width", "integer", "320 (the default), 640 or 1280 pixels at most.")),
        ("image/jpeg", "The picture, or an error as JSON."),
        errors=(400, 403, 404, 422, 503),
    ),
    ApiRoute(
        "GET",
        "/api/video/{id}",
        "video",
        "Send the file of a moment as it is. Answers range requests.",
        (ID,),
        ("application/octet-stream", "The file, with its own type where a browser may know it."),
        errors=(400, 403, 404, 416),
    ),
    ApiRoute(
        "GET",
        "/api/clip/{id}.mp4",
        "clip",
        "Play a moment as a film that any browser can play. Answers range requests.",
        (ID,),
        ("video/mp4", "H.264 and AAC, from 3 s before the moment to 5 s after it, at most 60 s."),
        errors=(400, 403, 404, 416, 422, 503),
    ),
    ApiRoute(
        "POST",
        "/api/add",
        "add",
        "Start to embed a folder or file into the index.",
        (),
        (JSON, "The state, as GET /api/add gives it."),
        ((JSON,), '{"path": an absolute path on the machine of the server}'),
        (400, 403, 409, 413, 415),
    ),
    ApiRoute(
        "GET",
        "/api/add",
        "adding",
        "Tell how far that has come.",
        (),
        (JSON, "{state: idle, running, done or failed; path, done, total, seconds, message}."),
    ),
)
REASONS = {
    400: "A value is missing or wrong.",
    403: "The request comes from another site, or is not allowed here.",
    404: "There is no such moment, or its file has changed or is gone.",
    408: "The upload took too long.",
    409: "A folder is being added already.",
    413: "The body is too large.",
    415: "The body has another type.",
    416: "The range lies outside of the file.",
    422: "The file cannot be decoded.",
    503: "The server is busy; try again in a moment.",
}


def openapi() -> dict[str, Any]:
    """Describe the API in the format of OpenAPI 3.1."""
    error = {
        "type": "object",
        "properties": {"error": {"type": "string"}},
        "required": ["error"],
    }
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        kind, text = route.returns
        schema = {"type": "object"} if kind == JSON else {"type": "string", "format": "binary"}
        responses: dict[str, Any] = {
            "200": {"description": text, "content": {kind: {"schema": schema}}}
        }
        for status in route.errors:
            responses[str(status)] = {
                "description": REASONS[status],
                "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
            }
        operation: dict[str, Any] = {
            "operationId": route.handler,
            "summary": route.summary,
            "parameters": [
                {
                    "name": parameter.name,
                    "in": parameter.place,
                    "required": parameter.required,
                    "description": parameter.text,
                    "schema": {"type": parameter.kind},
                }
                for parameter in route.parameters
            ],
            "responses": responses,
        }
        if route.body:
            kinds, about = route.body
            operation["requestBody"] = {
                "required": True,
                "description": about,
                "content": {kind: {} for kind in kinds},
            }
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "clipvip serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": error}},
    }


def docs() -> str:
    """Return the page /docs."""
    e = html.escape
    sections = []
    for route in ROUTES:
        rows = "".join(
            f"<tr><td><code>{e(p.name)}</code>{' (required)' if p.required else ''}</td>"
            f"<td>{e(p.kind)}</td><td>{e(p.text)}</td></tr>"
            for p in route.parameters
        )
        table = f"<table><tbody>{rows}</tbody></table>" if rows else ""
        kinds, text = route.body or ((), "")
        body = f"<p><b>Body</b> {e(', '.join(kinds))}: {e(text)}</p>" if kinds else ""
        errors = "".join(f"<li>{status}: {e(REASONS[status])}</li>" for status in route.errors)
        sections.append(
            f"<section><h2><span class=method>{route.method}</span> <code>{e(route.path)}</code>"
            f"</h2><p>{e(route.summary)}</p>{table}{body}"
            f"<p><b>Answer</b> {e(route.returns[0])}: {e(route.returns[1])}</p>"
            f"<details><summary>Errors</summary><ul>{errors}</ul></details></section>"
        )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>API · clipvip</title>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<link rel=icon href=/page/icon.svg><link rel=stylesheet href=/page/page.css></head>"
        "<body class=docs><main><p><a href=/>Search</a></p><h1>API</h1>"
        "<p>Errors are JSON: <code>{&quot;error&quot;: one sentence}</code>. "
        "<a href=/openapi.json>OpenAPI description</a>.</p>"
        f"{''.join(sections)}</main></body></html>"
    )
