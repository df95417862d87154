"""The search page: a server for one index, used from a browser or as an API.

    browser ─ guard ─ app ─┬─ VideoIndex             searches
                           ├─ decoders ─ in_decoder  pictures, films and uploads, in processes
                           ├─ media                  the files themselves
                           └─ adding                 embeds a folder, in a process

routes.py lists the API.
"""

from clipvip.serve.server import serve

__all__ = ["serve"]
