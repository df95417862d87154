"""The application: what each route of clipvip.serve.routes does."""

import asyncio
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote_from_bytes

from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from clipvip.data.video import DecodeError
from clipvip.files import shown
from clipvip.index import FileState, Hit, Moment, VideoIndex, Where
from clipvip.serve import in_decoder, media
from clipvip.serve.adding import Adding, folder_to_add
from clipvip.serve.cache import Cache
from clipvip.serve.decoders import Decoders
from clipvip.serve.errors import ApiError, Busy
from clipvip.serve.guard import Guard
from clipvip.serve.routes import ROUTES, docs, openapi
from clipvip.serve.threads import Threads

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
LONGEST_QUERY = 1000  # characters
MOST_HITS, HITS = 200, 24
UPLOAD_BYTES = 64 << 20
WIDTHS = (320, 640, 1280)  # of thumbnails
MOST_FOLDERS = 500  # that the page offers to choose from
SEARCHES, MOST_SEARCHES = 2, 50  # at once, and with those that wait
LOOKUPS, MOST_LOOKUPS = 2, 300  # of moments, such as those of a page's pictures
RECEIVE_SECONDS = 120.0  # that an upload may take
# Seconds that a decoder may take.
PICTURE_SECONDS, FILM_SECONDS, UPLOAD_SECONDS = 20.0, 60.0, 20.0
PICTURE_BYTES, FILM_BYTES = 64 << 20, 128 << 20  # that are kept in memory

Result = TypeVar("Result")


class App:
    """The state of a server, and one method per route.

    index: what is searched. where: its folder, which the process that adds files opens.
    local: whether only this machine can reach the server; others may not read its folders.
    """

    def __init__(self, index: VideoIndex, where: str, local: bool) -> None:
        self.index, self.where, self.can_add = index, where, local
        self.decoders = Decoders(max(2, min(4, (os.cpu_count() or 1) // 2)))
        self.pictures, self.films = Cache(PICTURE_BYTES), Cache(FILM_BYTES)
        self.adding_ = Adding(where)
        self.searches = Threads(SEARCHES, MOST_SEARCHES)
        self.lookups = Threads(LOOKUPS, MOST_LOOKUPS)
        self.uploads = 0

    async def warm_up(self) -> None:
        """Load the model and the vectors, and start a decoder, before the first search."""
        with suppress(Exception):  # that search will report it
            await self._ask(partial(self.index.search, "a", 1, where=None))
            await self.decoders.run(in_decoder.nothing, seconds=PICTURE_SECONDS)

    # --- searches -------------------------------------------------------------------------

    async def search(self, request: Request) -> Response:
        given = values(request)
        query = given.get("q", "").strip()
        if not query:
            raise ApiError(400, "q is empty; expected a sentence")
        if len(query) > LONGEST_QUERY:
            raise ApiError(400, f"q has {len(query)} characters; expected at most {LONGEST_QUERY}")
        return await self._hits(self.index.search, query, given)

    async def like(self, request: Request) -> Response:
        moment = await self._moment(request)
        return await self._hits(self.index.like, moment.id, values(request))

    async def search_by_upload(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        main = kind.partition("/")[0]
        if main not in ("image", "video") and kind != "application/octet-stream":
            raise ApiError(
                415, f"the body is {shown(kind) or 'of no type'}; expected an image or a video"
            )
        given = values(request)
        filters(given)  # before anything is read
        if self.uploads >= SEARCHES:
            raise Busy("other uploads are being searched; try again in a moment")
        self.uploads += 1
        try:
            with tempfile.TemporaryDirectory(prefix="clipvip-") as folder:
                suffix = {"image": ".png", "video": ".video"}.get(main, "")
                path = Path(folder, f"query{suffix}")
                await asyncio.wait_for(_receive(request, path), RECEIVE_SECONDS)
                # A file from a stranger is decoded by a process that may crash.
                copied = await self.decoders.run(in_decoder.copy, str(path), seconds=UPLOAD_SECONDS)
                return await self._hits(self.index.search, Path(copied), given)
        except asyncio.TimeoutError:  # another type in Python 3.10
            raise ApiError(408, f"the upload took more than {RECEIVE_SECONDS:.0f} s") from None
        except DecodeError as error:
            reason = f"the upload is no image or video that can be read: {shown(error.reason)}"
            raise ApiError(400, reason) from None
        finally:
            self.uploads -= 1

    async def _hits(
        self, search: Callable[..., list[Hit]], query: Any, given: dict[str, str]
    ) -> Response:
        k, where = number(given, "k", HITS, 1, MOST_HITS), filters(given)
        started = time.monotonic()
        hits = await self._ask(partial(search, query, k, where=where))
        seconds = round(time.monotonic() - started, 4)
        return answer({"hits": [hit_as_json(hit) for hit in hits], "seconds": seconds})

    async def _ask(self, work: Callable[[], Result]) -> Result:
        """Do work of the index in a thread. Raises ApiError."""
        try:
            return await self.searches.run(work)
        except ValueError as error:
            raise ApiError(400, one_line(error)) from None

    # --- what is in the index -------------------------------------------------------------

    async def about(self, request: Request) -> Response:
        about, moments, captions, files = await self._ask(
            lambda: (
                self.index.about,
                self.index.count,
                self.index.captions,
                self.index.videos(),
            )
        )
        description = {
            "index": shown(self.where),
            "model": shown(about.model),
            "moments": moments,
            "captions": captions,
            "videos": len(files),
            # A stranger's index may state lengths whose sum JSON cannot hold.
            "seconds": round(min(sum(file.duration for file in files), sys.float_info.max), 1),
            "sources": [shown(source) for source in about.sources],
            "folders": folders_of(files),
            "can_add": self.can_add,
        }
        return answer(description)

    async def videos(self, request: Request) -> Response:
        given = values(request)
        offset = number(given, "offset", 0, 0, 1 << 40)
        limit = number(given, "limit", 100, 1, 1000)
        files = await self._ask(partial(self.index.videos, filters(given)))
        files = sorted(files, key=lambda file: (-file.date, file.path))
        listed = [
            {
                "path": file.path,
                **names(file),
                "size": file.size,
                "duration": file.duration,
                "date": file.date,
            }
            for file in files[offset : offset + limit]
        ]
        return answer({"videos": listed, "total": len(files)})

    # --- files ----------------------------------------------------------------------------

    async def thumbnail(self, request: Request) -> Response:
        side = number(values(request), "width", WIDTHS[0], WIDTHS[0], WIDTHS[-1])
        if side not in WIDTHS:
            raise ApiError(400, f"width is {side}; expected one of {WIDTHS}")
        moment = await self._moment(request)
        file, tag = moment.file, media.tag_of(moment, str(side))
        await to_thread.run_sync(media.check_file, file)
        if media.unchanged(request, tag):
            return Response(None, 304, {"etag": tag})
        if await request.is_disconnected():  # scrolled past, while others were made
            return Response(None, 499)
        task = (in_decoder.picture, file.path, moment.start, moment.end, side)
        data = await self._decoded(self.pictures, tag, task, PICTURE_SECONDS)
        headers = {"etag": tag, "cache-control": "private, max-age=600"}
        return Response(data, 200, headers, media_type="image/jpeg")

    async def clip(self, request: Request) -> Response:
        moment = await self._moment(request)
        file, tag = moment.file, media.tag_of(moment, "film")
        await to_thread.run_sync(media.check_file, file)
        if media.is_image(file):
            raise ApiError(422, "an image has no film")
        task = (in_decoder.film, file.path, *media.film_span(moment))
        data = await self._decoded(self.films, tag, task, FILM_SECONDS)
        return media.send_bytes(request, data, "video/mp4", tag)

    async def video(self, request: Request) -> Response:
        moment = await self._moment(request)
        return await to_thread.run_sync(media.send_file, request, moment)

    async def _moment(self, request: Request) -> Moment:
        given = request.path_params["id"]
        if not re.fullmatch(r"[0-9a-f]{16}", given, re.ASCII):
            raise ApiError(400, f"{shown(given)[:40]!r} is no id; expected 16 hexadecimal digits")
        try:
            return await self.lookups.run(self.index.moment, given)
        except ValueError as error:
            raise ApiError(404, one_line(error)) from None

    async def _decoded(
        self, cache: Cache, key: str, task: tuple[Any, ...], seconds: float
    ) -> bytes:
        try:
            return await cache.get(key, partial(self.decoders.run, *task, seconds=seconds))
        except DecodeError as error:
            raise ApiError(422, f"the file cannot be decoded: {shown(error.reason)}") from None

    # --- adding ---------------------------------------------------------------------------

    async def add(self, request: Request) -> Response:
        if not self.can_add:
            raise ApiError(
                403, "folders are added only if the server listens on this machine alone"
            )
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip() != "application/json":
            raise ApiError(415, "expected a body of type application/json")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > 1 << 16:
                raise ApiError(413, "the body is larger than 64 KB")
        try:
            given = json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise ApiError(
                400, 'the body is not JSON; expected {"path": "/absolute/path"}'
            ) from None
        path = given.get("path") if isinstance(given, dict) else None
        folder = await to_thread.run_sync(folder_to_add, path)
        self.adding_.start(folder)
        return answer(self.adding_.state())

    async def adding(self, request: Request) -> Response:
        return answer(self.adding_.state())


def build_app(index: VideoIndex, where: str, host: str = "127.0.0.1", local: bool = True) -> Any:
    """Return the ASGI application that serves an index; see App and Guard for the arguments."""
    app = App(index, where, local)

    @asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(app.warm_up())
        yield
        warming.cancel()
        app.decoders.close()
        await app.adding_.close()

    routes = [
        Route(route.path, getattr(app, route.handler), methods=[route.method]) for route in ROUTES
    ]
    page = {name: (PAGE / name).read_bytes() for name in PAGE_FILES}
    static = [("/", page["index.html"], "text/html"), ("/docs", docs().encode(), "text/html")]
    static += [(f"/page/{name}", page[name], kind) for name, kind in PAGE_FILES.items()]
    static.append(("/openapi.json", json.dumps(openapi()).encode(), "application/json"))
    routes += [Route(path, _static(data, kind)) for path, data, kind in static]
    handlers: dict[Any, Any] = {
        ApiError: lambda _, error: _failure(error.status, str(error)),
        404: lambda _, error: _failure(404, "there is nothing here; /docs lists what there is"),
        405: lambda _, error: _failure(405, "this address takes another method; see /docs"),
        ClientDisconnect: lambda _, error: Response(None, 499),
        Exception: lambda _, error: _failure(500, "the server failed; its terminal says why"),
    }
    return Guard(
        Starlette(routes=routes, exception_handlers=handlers, lifespan=running), host, local
    )


def _static(data: bytes, kind: str) -> Callable[[Request], Response]:
    headers = {"cache-control": "no-cache"}
    return lambda request: Response(data, 200, headers, media_type=kind)


def _failure(status: int, sentence: str) -> Response:
    return answer({"error": sentence}, status)


# --- from requests and to answers -----------------------------------------------------------


def answer(value: Any, status: int = 200) -> Response:
    """Return a value as JSON, in ASCII: half a character becomes an escape."""
    data = json.dumps(value, allow_nan=False)
    return Response(data, status, {"cache-control": "no-store"}, media_type="application/json")


def one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()))


def values(request: Request) -> dict[str, str]:
    """Return the values of a query. Bytes that are not UTF-8 become lone surrogates, as in paths.
    Raises ApiError for a value that is given twice, and for too many."""
    text = request.scope["query_string"].decode("latin-1")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="surrogateescape", max_num_fields=50)
    except ValueError:
        raise ApiError(400, "the address has more than 50 values") from None
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ApiError(400, f"{shown(twice[0])[:40]} is given twice")
    return {name: value for name, value in pairs if value}


def number(given: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    """Return a whole number. Raises ApiError."""
    text = given.get(name, str(default))
    if not re.fullmatch(r"\d{1,15}", text, re.ASCII) or not least <= int(text) <= most:
        raise ApiError(400, f"{name} is {shown(text)[:40]!r}; expected {least} to {most}")
    return int(text)


def filters(given: dict[str, str]) -> Where | None:
    """Return which files to look at; None for all. Raises ApiError."""
    folder = given.get("folder")
    if folder is not None and not os.path.isabs(folder):
        raise ApiError(400, f"folder is {shown(folder)[:200]!r}; expected an absolute path")
    where = Where(
        folder=None if folder is None else os.path.normpath(folder),
        min_duration=_seconds(given, "min_duration"),
        max_duration=_seconds(given, "max_duration"),
        after=_day(given, "after"),
        before=_day(given, "before"),
    )
    return None if where == Where() else where


def _seconds(given: dict[str, str], name: str) -> float | None:
    text = given.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        raise ApiError(400, f"{name} is {shown(text)[:40]!r}; expected a number of seconds")
    return float(text)


def _day(given: dict[str, str], name: str) -> float | None:
    text = given.get(name)
    if text is None:
        return None
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            raise ValueError
        return datetime.strptime(text, "%Y-%m-%d").timestamp()
    except (ValueError, OverflowError, OSError):
        reason = f"{name} is {shown(text)[:40]!r}; expected a day such as 2024-05-01"
        raise ApiError(400, reason) from None


def names(file: FileState) -> dict[str, str]:
    """Return name and folder of a file as text that is safe to show."""
    folder, name = os.path.split(file.path)
    return {"name": shown(name), "folder": shown(folder)}


def hit_as_json(hit: Hit) -> dict[str, Any]:
    moment = hit.moment
    image = media.is_image(moment.file)
    film = None if image else [round(second, 3) for second in media.film_span(moment)]
    caption = None if hit.caption is None else shown(hit.caption)
    return {
        **hit.as_json(),
        **names(moment.file),
        "caption": caption,
        "image": image,
        "film": film,
    }


def folders_of(files: Iterable[FileState]) -> list[dict[str, str]]:
    """Return the folders that hold files, those with the most files if there are many.

    A folder is the text to show, and the value for a query's `folder`, which keeps bytes that are
    not UTF-8.
    """
    counts = Counter(os.path.dirname(file.path) for file in files)
    most = sorted(folder for folder, _ in counts.most_common(MOST_FOLDERS))
    return [
        {"text": shown(folder), "query": quote_from_bytes(os.fsencode(folder))} for folder in most
    ]


async def _receive(request: Request, path: Path) -> None:
    """Write the body of a request to a file. Raises ApiError if it is too large or empty."""
    too_large = ApiError(413, f"the upload is larger than {UPLOAD_BYTES >> 20} MB")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > UPLOAD_BYTES:
        raise too_large
    size = 0
    with path.open("xb") as file:
        async for piece in request.stream():
            size += len(piece)
            if size > UPLOAD_BYTES:
                raise too_large
            file.write(piece)
    if not size:
        raise ApiError(400, "the body is empty; expected an image or a video")
