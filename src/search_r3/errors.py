"""Errors that a user can act on: what happened, where, and what to do next.

The command line prints them as one line and exits with status 2; anything else is a bug and shows its traceback.
"""

from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type's name where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


class SearchR3Error(Exception):
    """Base of every error that the user, not a programmer, can mend."""


class DataError(SearchR3Error):
    """A document, query or judgement that cannot be used; the message names file, line and field."""


class EmptyTextError(DataError):
    """A document without any text."""


class CheckpointError(SearchR3Error):
    """A model folder that cannot be loaded, fetched or trusted."""


class StoreError(SearchR3Error):
    """An index folder that cannot be opened, trusted or written."""


class MissingExtraError(SearchR3Error):
    """An optional package that is not installed; the message says with which extra it comes."""


class TrainingError(SearchR3Error):
    """A recipe that cannot be run, or a run that cannot go on."""


def check_texts(texts: Iterable[str]) -> list[str]:
    """The texts. Raises TypeError for one in place of several, DataError for one that cannot be tokenised."""
    refuse_string(texts)
    texts = list(texts)
    for number, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError:  # undecodable bytes, kept by Python as lone surrogates
            raise DataError(f"text number {number} is not UTF-8; convert it") from None
    return texts


def refuse_string(texts: object) -> None:
    """Raises TypeError for one text in place of several, which would be taken letter by letter."""
    if isinstance(texts, str):
        raise TypeError("one text was given where a list of texts is needed; put it into a list")
