"""Which parts of a clip omnisource post-pretraining compares (section 3.3 of the paper).

Its loss has up to three terms: video with subtitle (V-S), video with caption (V-C), and frame with
caption (F-C). A clip is a positive in each term of which it has both sides:

| clip | V-S | V-C | F-C |
|---|---|---|---|
| video, `subtitle` | subtitle | | |
| video, `caption` | | caption | caption |
| video, `subtitle`, `caption` | subtitle | caption | caption |
| video, `text` | text | | |
| video, `text`, `caption` | text | caption | caption |
| image, `caption` or `text` | | | caption, else text |

- A `text` describes the whole video. So it takes the place of a missing subtitle, and is never
  compared with one frame. If a clip has a subtitle, its `text` is not used. Neither is a text that
  equals the caption, as the `.txt` beside a video in another tool's tar: that would count the same
  pair twice.
- An image is a frame, and not also a video of that frame: V and F would be the same feature,
  embedded twice, and V-C, which is for videos, would only repeat F-C. It has no video feature,
  neither as a positive nor as a negative.
- An image is a video of one frame where V and F are not the same or F is not compared: if it has a
  `subtitle`, or an `image` besides, or if the loss has no F-C.
- Where captions are not compared (variant `vs`), an image's `text` takes the place of a subtitle.
- Every part that a clip has, in a term or not, is a negative for the other clips of the batch: the
  middle frame of a video without a caption is one in F-C.
"""

from clipvip.data.annotations import Clip

COMPARED = ("subtitle", "frame", "caption")  # with videos, or with each other


def is_only_frame(clip: Clip, picture: bool, image: object, compared: tuple[str, ...]) -> bool:
    """Whether a clip is embedded as a frame alone, and not as a video.

    picture: whether its video is an image. image: its annotated image, None for none.
    compared: which of COMPARED the loss compares.
    """
    return picture and image is None and clip.subtitle is None and "frame" in compared


def role_of_text(
    clip: Clip, picture: bool, compared: tuple[str, ...]
) -> tuple[str | None, tuple[str, ...]]:
    """Return which text the clip's `text` takes the place of, "subtitle" or "caption", and those of
    its texts that may; None and all of its texts if it takes no place. Arguments: is_only_frame's.
    """
    role = "caption" if picture and "caption" in compared else "subtitle"
    texts = clip.text
    if role == "subtitle" and "caption" in compared:
        texts = tuple(text for text in texts if text != clip.caption)
    if not texts or role not in compared or getattr(clip, role) is not None:
        return None, clip.text
    return role, texts


def texts_compared(clip: Clip, picture: bool, compared: tuple[str, ...]) -> set[str]:
    """Return which texts, "subtitle" and "caption", the loss compares of a clip. Arguments:
    is_only_frame's."""
    given = {name for name in ("subtitle", "caption") if getattr(clip, name) is not None}
    role, _ = role_of_text(clip, picture, compared)
    return (given | ({role} if role else set())) & set(compared)
