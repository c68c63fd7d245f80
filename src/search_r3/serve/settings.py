"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of a server; every one of them is there to keep it answering."""

    api_key: str | None = None
    """Asked for as `Authorization: Bearer KEY` or `X-API-Key: KEY`; None: nobody is asked."""
    timeout: float = 60.0
    """Seconds until a request is given up (504), a body has to have come (408), and a reader has to have read."""
    queue: int = 4096
    """Texts that may wait for the model; more are refused (429)."""
    batch: int = 64
    """Most texts of one pass of the model, of one or many requests."""
    batch_tokens: int = 2048
    """Most tokens of one pass, about; a longer text has a pass of its own."""
    thinkers: int = 16
    """Most queries that are reasoned over together."""
    body_bytes: int = 8 << 20
    """Larger bodies are refused (413)."""
    held_bytes: int = 256 << 20
    """Bodies of all requests in progress together; more are refused (429)."""
    text_chars: int = 200_000
    """Longer texts are refused (413)."""
    texts: int = 2048
    """Most texts or documents of one request."""
    cache: int = 4096
    """Query vectors kept."""
    hosts: tuple[str, ...] = ()
    """Names that the server may be called by (its `Host`); any by default. Where no key is asked for, names keep web
    pages of others from reaching a server on this machine by a name that they have pointed at it."""
    origins: tuple[str, ...] = ()
    """Web origins that may call from a browser (CORS); none by default."""
