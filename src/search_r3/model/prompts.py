"""What the model is told: the two acts, rendered once into plain strings and stored with the checkpoint.

A chat template can depend on the day or on the library's version. Only the rendered text around the user's words is
kept, so that a checkpoint means the same thing everywhere and forever.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search_r3.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ActName = Literal["embed", "reason"]

_MARK = "\u2063SEARCH-R3-TEXT\u2063"  # stands for the user's text while a template is rendered


class Act(BaseModel):
    """The fixed text around the user's text. Control tokens in it are control tokens; in the user's they never are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str = Field(min_length=1)
    """Everything before the user's text: identical in every turn, so its key-value cache is shared."""
    suffix: str
    """Everything between the user's text and what the model writes (reason) or the embedding token (embed)."""


class Prompts(BaseModel):
    """Both acts of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed: Act
    """Represent this text: documents, fast queries."""
    reason: Act
    """Think first, then represent: queries."""


class SystemPrompts(BaseModel):
    """The words that prompts are rendered from; the defaults are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed_system: str = (
        "You represent texts for semantic search. Read the text and capture what it is about, its key terms and the "
        "questions it answers in one embedding."
    )
    """System message of the embed act."""
    reason_system: str = (
        "You enrich search queries before they are embedded. Think about what the user is looking for: name the core "
        "concepts, give the key terms with a short definition each, synonyms and related topics. Be brief."
    )
    """System message of the reason act."""
    embed_reply: str = "The embedding is"
    """What the assistant says before the embedding token in the embed act."""


def read_prompts(path: Path) -> Prompts | SystemPrompts:
    """Prompts from a JSON file: rendered (`embed` and `reason`, each with `prefix` and `suffix`) or system messages.

    Raises CheckpointError naming the file and field.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = Prompts if isinstance(raw, dict) and "embed" in raw else SystemPrompts
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error


def render_prompts(tokenizer: PreTrainedTokenizerBase, words: SystemPrompts | None = None) -> Prompts:
    """Render both acts through the tokenizer's own chat template (ChatML where it has none)."""
    words = words or SystemPrompts()
    prefix, suffix = _render(tokenizer, words.embed_system)
    reason_prefix, reason_suffix = _render(tokenizer, words.reason_system)
    return Prompts(
        embed=Act(prefix=prefix, suffix=suffix + words.embed_reply),
        reason=Act(prefix=reason_prefix, suffix=reason_suffix),
    )


def _render(tokenizer: PreTrainedTokenizerBase, system: str) -> tuple[str, str]:
    if not tokenizer.chat_template:
        head = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        return head, "<|im_end|>\n<|im_start|>assistant\n"
    from jinja2 import TemplateError

    def apply(messages: list[dict[str, str]]) -> str:
        # enable_thinking=False: Qwen3's own thinking block would stand between the prompt and our reasoning.
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        )

    text = ""
    with suppress(TemplateError):
        text = apply([{"role": "system", "content": system}, {"role": "user", "content": _MARK}])
    if not text or system.strip() not in text:  # templates without a system role raise (Gemma), or leave it out (Phi-3)
        try:
            text = apply([{"role": "user", "content": f"{system}\n\n{_MARK}"}])
        except TemplateError as error:
            raise CheckpointError(f"the tokenizer's chat template cannot be used: {error}") from error
    before, mark, after = text.partition(_MARK)
    if not mark or not before:
        raise CheckpointError("the tokenizer's chat template does not show the user's message; mend its chat_template")
    return before, after
