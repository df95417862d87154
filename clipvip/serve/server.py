"""Start the server, and stop it."""

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import sys
from pathlib import Path

import uvicorn

from clipvip.files import shown
from clipvip.index import VideoIndex
from clipvip.index.tables import is_uri, local

STOP_SECONDS = 1  # for answers that are being sent


def serve(where: str | Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve the search page of an index until ctrl-C or SIGTERM. The current folder becomes /.

    Raises ValueError if there is no index, or if the server cannot listen on host and port.
    """
    name = os.fspath(where)
    index = VideoIndex(name if is_uri(name) else local(name), in_memory=True)
    moments = index.count
    listening = listen(host, port)
    # Processes that multiprocessing starts would import a signal.py, for example, that lies in the
    # current folder, as a stranger's index may.
    for place in ("HF_HOME", "HF_HUB_CACHE"):
        if os.environ.get(place):
            os.environ[place] = os.path.abspath(os.path.expanduser(os.environ[place]))
    os.chdir(os.sep)
    loopback = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    if not loopback:
        print(
            "clipvip: warning: anyone who reaches this address can search and watch the videos of "
            "this index; adding folders is off",
            file=sys.stderr,
        )
    shown_host = f"[{host}]" if ":" in host else host
    url = f"http://{shown_host}:{listening.getsockname()[1]}"
    print(f"{shown(where)}: {moments:,} moments; search at {url} (ctrl-C stops)", flush=True)
    from clipvip.serve.app import build_app  # with torch: slow, while a browser may connect already

    config = uvicorn.Config(
        build_app(index, index.where, host, loopback),
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    with listening:
        asyncio.run(uvicorn.Server(config).serve([listening]))


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log says more than that answers are cut off when the server stops."""
    error = record.exc_info[1] if record.exc_info else None
    return not (
        isinstance(error, asyncio.CancelledError) or str(record.msg).startswith("Cancel %s running")
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises ValueError."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; expected 0 to 65535 (0: any that is free)")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except (socket.gaierror, UnicodeError):
        reason = f"host is {shown(host)!r}; expected a name or address of this machine"
        raise ValueError(reason) from None
    except PermissionError:
        raise ValueError(
            f"port {port} needs more rights; give another --port, such as 8000"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} of {shown(host)} is in use; give another one, such as --port"
            raise ValueError(f"{reason} {port + 1 if port < 65535 else 8000}") from None
        raise ValueError(f"cannot listen on {shown(host)}: {error.strerror}") from None
