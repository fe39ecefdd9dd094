"""Parts of messages that hold no text: which media they are, and why they are refused."""

from __future__ import annotations

MEDIA = {"image": "images", "audio": "audio", "video": "videos", "file": "files", "document": "files"}
"""Words in the type of a part (image_url, input_audio, ...) -> what it holds."""
MAX_KIND = 50
"""Letters of a client's word that an answer repeats."""


def media_of(kind: object) -> str | None:
    """The media of a part's type; None for text and what is not known."""
    return next((media for word, media in MEDIA.items() if word in str(kind).split("_")), None)


def unsupported_kind(kind: object) -> str:
    """Why content of this type is refused, in words that follow the name of its field."""
    told, media = repr(str(kind)[:MAX_KIND]), media_of(kind)
    if media is None:
        return f"content of type {told} is not supported by this model, which takes text only"
    return f"content of type {told} is not supported: this model's {media} are not served yet; send text only"
