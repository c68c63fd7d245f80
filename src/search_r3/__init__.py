"""search-r3: language models that think, then embed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_r3.model.search_r3 import SearchR3
    from search_r3.records import Document, Hit, Query, Reasoned, Status
    from search_r3.retriever import Retriever

__version__ = "0.1.0"

_HOME = {
    "SearchR3": "search_r3.model.search_r3",
    "Retriever": "search_r3.retriever",
    "Document": "search_r3.records",
    "Hit": "search_r3.records",
    "Query": "search_r3.records",
    "Reasoned": "search_r3.records",
    "Status": "search_r3.records",
}
__all__ = ["Document", "Hit", "Query", "Reasoned", "Retriever", "SearchR3", "Status"]


def __getattr__(name: str) -> Any:
    """Import public names on first use: `import search_r3` alone loads no torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'search_r3' has no attribute {name!r}")
