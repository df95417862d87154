"""Limits on the pixels of one file, checked before memory is allocated.

A few bytes can claim a picture of a billion pixels. Frames and images larger than MAX_PIXELS are
refused like damaged ones. The reason names the environment variable CLIPVIP_MAX_MEGAPIXELS, which
sets another limit. Pillow refuses images of 179 million pixels and more in any case.
"""

import os

VARIABLE = "CLIPVIP_MAX_MEGAPIXELS"


def _megapixels() -> float:
    given = os.environ.get(VARIABLE, "67.2")  # 8192 × 8192
    try:
        megapixels = float(given)
    except ValueError:
        megapixels = 0.0
    if not 0 < megapixels <= 500:
        raise ValueError(f"{VARIABLE} is {given!r}; expected a number from 0 to 500, such as 67.2")
    return megapixels


MAX_PIXELS = int(_megapixels() * 1e6)  # a decoder holds up to 17 frames


def too_large(width: int, height: int) -> str | None:
    """Return the reason why a picture of this size is refused; None where it is not."""
    if width * height <= MAX_PIXELS:
        return None
    return (
        f"{width} × {height} pixels, more than the {MAX_PIXELS / 1e6:g} million allowed; "
        f"{VARIABLE} changes that"
    )
