"""Base model + embedding token + prompts + manifest <-> one plain folder.

The folder is an ordinary transformers checkpoint with one more file, `search_r3.json`: the manifest. It names what
the vectors depend on (weights, prompts, lengths) by value or hash, so that a result or an index can be traced to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from search_r3.errors import CheckpointError, first_line
from search_r3.files import cache_home, given_path, new_folder, sha256_file, write_json, write_text
from search_r3.model.prompts import Prompts, SystemPrompts, render_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBED_TOKEN = "<|embed_token|>"
MANIFEST = "search_r3.json"
FORMAT = 2
AVERAGED = ", averaged with "  # between the two sources of a mean
LOGIT_SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # of Granite, Cohere, Gemma
OURS = ("base", "default")  # made on each machine, perhaps with another rounding: their hashes are not compared
BASE = 2  # counts the ways in which the cached base was written; another number makes it anew


class MaxTokens(BaseModel):
    """Lengths that a checkpoint is used with by default, in tokens of its own tokenizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    document: int = Field(default=512, ge=1)
    """A document's (or passage's) tokens beyond this are cut."""
    query: int = Field(default=256, ge=1)
    """A query's tokens beyond this are cut."""
    reasoning: int = Field(default=64, ge=1)
    """Most tokens the model may think, embedding token included."""


class Parent(BaseModel):
    """Where a checkpoint came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Folder or hub name of the base model."""
    weights_sha256: str
    """Hash over its weight files."""


class Stage(BaseModel):
    """One training run on the way to a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    stage: Literal["sft", "rl"]
    """Supervised, or reinforcement."""
    recipe: dict[str, Any]
    """All settings, those that it ended with."""
    changes: tuple[str, ...] = ()
    """What of them was changed on the way, and from which checkpoint on."""
    data: str
    """SHA-256 over the training examples."""
    parent: Parent | None = None
    """What it began with."""
    teacher_sha256: str | None = None
    """Of the teacher's weights, where its recipe names one."""
    versions: dict[str, str] = {}
    """Libraries that it began with."""
    commit: str | None = None
    """Of our code then, where that was a git checkout; ends in -dirty where files differed from it."""


class Manifest(BaseModel):
    """Everything about a checkpoint that is not in its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    """Version of this file's layout."""
    embed_token: str
    """The token whose state is the embedding."""
    embed_token_id: int
    """Its id."""
    dimension: int
    """Width of an embedding."""
    prompts: Prompts
    """Rendered text of both acts."""
    max_tokens: MaxTokens = MaxTokens()
    """Default lengths."""
    parent: Parent | None = None
    """The model this one was made from."""
    training: tuple[Stage, ...] = ()
    """What it was trained with, first to last."""
    files: dict[str, str]
    """SHA-256 of each weight and tokenizer file and of config.json."""
    versions: dict[str, str]
    """Libraries that wrote the folder."""
    created: str
    """UTC time, ISO 8601."""

    @property
    def weights_sha256(self) -> str:
        """One hash over all files that decide what the model computes."""
        return _digest(self.files)

    @property
    def fingerprint(self) -> str:
        """Names the embedding space of documents: equal fingerprints mean comparable vectors.

        Depends on weights, tokenizer, the embedding token and the embed prompt; not on lengths or the reason prompt.
        """
        return _digest([self.files, self.embed_token_id, self.prompts.embed.model_dump()])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading bars and notices: our own messages say what matters."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def resolve(source: str | Path) -> Path:
    """Local folder of a checkpoint: `default`, `base` (the same before training), an existing folder, or a hub name.

    Raises CheckpointError when there is none.
    """
    if str(source) == "base":
        return _prepared_base()
    if str(source) == "default":
        return _prepared_default()
    folder = given_path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file; a checkpoint is a folder that holds {MANIFEST} or config.json")
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")) or folder.parent.is_dir():
        raise CheckpointError(
            f"{source}: no such folder; give a checkpoint folder, a hub name such as Qwen/Qwen2.5-1.5B-Instruct, "
            "or 'default'"
        )
    from huggingface_hub import snapshot_download

    try:
        allowed = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(str(source), allow_patterns=allowed))
    except Exception as error:  # the hub raises a dozen unrelated types
        raise CheckpointError(
            f"{source}: no such folder, and it cannot be fetched from the model hub ({first_line(error)})"
        ) from error


def lasting_name(source: str | Path) -> str:
    """A checkpoint's name that means the same from any folder."""
    return str(Path(source).resolve()) if str(source) not in OURS and Path(source).is_dir() else str(source)


def _prepared_default() -> Path:
    """The base with our adapter merged in, made once and kept in the cache."""
    from search_r3.model.default import ADAPTER, TRAINED_NAME

    made_of = [ADAPTER / name for name in ("adapter_model.safetensors", "adapter_config.json", MANIFEST)]
    digest = _digest([str(BASE), *(sha256_file(path) for path in made_of if path.exists())])
    folder = cache_home() / "models" / f"{TRAINED_NAME}-{digest[:12]}"
    if not folder.exists():
        model, tokenizer, manifest = load(ADAPTER)
        parent = Parent(source="base", weights_sha256=_digest(_hash_files(_prepared_base())))
        _keep(folder, model, tokenizer, manifest.prompts, parent, manifest.max_tokens, manifest.training)
    return folder


def _prepared_base() -> Path:
    from search_r3.model.default import NAME, WHEEL_SHA256, load_default_base

    folder = cache_home() / "models" / f"{NAME}-{BASE}"
    if not folder.exists():
        try:
            model, tokenizer = load_default_base()
        except OSError as error:
            raise CheckpointError(f"cannot convert the default model: {error}; is the disk full?") from error
        _add_embed_token(model, tokenizer)
        _keep(folder, model, tokenizer, render_prompts(tokenizer), Parent(source=NAME, weights_sha256=WHEEL_SHA256))
    return folder


def _keep(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    parent: Parent,
    max_tokens: MaxTokens | None = None,
    training: tuple[Stage, ...] = (),
) -> None:
    try:
        save(folder, model, tokenizer, prompts, max_tokens=max_tokens, parent=parent, training=training)
    except OSError as error:
        if not folder.exists():  # otherwise another process was faster
            raise CheckpointError(f"cannot write the default model to {folder}: {error}") from error


def initialise(base: str | Path, folder: Path, words: SystemPrompts | None = None) -> Manifest:
    """Give a plain instruction model the embedding token and our prompts, and write the checkpoint to `folder`.

    base: a folder or a hub name. words: other system messages than ours. Raises FileExistsError if `folder` is not
    empty and CheckpointError if the base cannot be loaded.
    """
    path = resolve(base)
    before = read_manifest(path)
    if before:
        _verify(path, before)
    model, tokenizer = _load_plain(path, "auto")
    _add_embed_token(model, tokenizer)
    parent = Parent(source=str(base), weights_sha256=_digest(_hash_files(path)))
    return save(
        folder,
        model,
        tokenizer,
        render_prompts(tokenizer, words),
        max_tokens=before.max_tokens if before else None,
        parent=parent,
        training=before.training if before else (),
    )


def _add_embed_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the token where it is missing; the vocabulary grows only where the model has no spare row."""
    from tokenizers import AddedToken

    if EMBED_TOKEN in tokenizer.get_vocab():
        return
    tokenizer.add_tokens([AddedToken(EMBED_TOKEN, normalized=False, special=True)], special_tokens=True)
    token_id = int(tokenizer.convert_tokens_to_ids(EMBED_TOKEN))
    if token_id >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    _initialise_row(model, token_id)


def _initialise_row(model: PreTrainedModel, token_id: int) -> None:
    """Start the embedding token at the mean of all rows that the model was trained with. (ours)

    A mean row hardly moves the model's own predictions (Hewitt, 2021), which matters where input and output rows are
    tied: rows of related words made the untrained default emit the token at once, before any reasoning, and gave far
    worse vectors (nDCG@10 on a set of 800 sentences 0.04, against 0.32 for the mean).
    """
    tables = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for table in tables.values():  # one table when input and output are tied
            table[token_id] = table[:token_id].float().mean(dim=0).to(table.dtype)


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    embed_token: str = EMBED_TOKEN,
    max_tokens: MaxTokens | None = None,
    parent: Parent | None = None,
    training: tuple[Stage, ...] = (),
) -> Manifest:
    """Write a whole checkpoint folder at once (safetensors weights, tokenizer, manifest) and return its manifest."""
    with new_folder(folder) as temporary:
        with quiet():
            try:
                model.save_pretrained(temporary)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(f"weights cannot be written: {error}") from error
            config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
            config.pop("transformers_version", None)  # the same model is the same files, whichever version wrote them
            write_json(temporary / "config.json", config)
            tokenizer.save_pretrained(temporary)
        manifest = describe(
            temporary, model, tokenizer, prompts, embed_token, max_tokens or MaxTokens(), parent, training
        )
        write_text(temporary / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def describe(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    embed_token: str,
    max_tokens: MaxTokens,
    parent: Parent | None = None,
    training: tuple[Stage, ...] = (),
) -> Manifest:
    """The manifest of a folder's files and a loaded model."""
    return Manifest(
        embed_token=embed_token,
        embed_token_id=int(tokenizer.convert_tokens_to_ids(embed_token)),
        dimension=model.config.get_text_config().hidden_size,
        prompts=prompts,
        max_tokens=max_tokens,
        parent=parent,
        training=training,
        files=_hash_files(folder),
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Of the libraries that decide what a model computes."""
    return {name: version(name) for name in ("search-r3", "transformers", "torch")}


def _hash_files(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), *folder.glob("tokenizer.json"), *folder.glob("config.json")]
    return {path.name: sha256_file(path) for path in sorted(files)}


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where it has none (a checkpoint of another project)."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(raw, dict) and isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
            raise CheckpointError(f"{path}: format {raw['format']} is newer than this search-r3 reads; upgrade it")
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: field {place}: {first['msg']}; restore the file or save it again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable manifest ({error}); restore the file or save it again"
        ) from error


def load(
    folder: Path,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    *,
    prompts: Prompts | SystemPrompts | None = None,
    embed_token: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Manifest]:
    """Load a checkpoint, or a LoRA adapter on top of the checkpoint that its manifest or config names.

    An adapter without a manifest has its base's prompts and lengths. prompts, embed_token: override the folder's own;
    needed for other projects' models. Files are checked against the manifest's hashes. Raises CheckpointError for
    anything missing, damaged or without an embedding token.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        _verify(folder, manifest)
    if (folder / "adapter_config.json").exists():
        return _load_adapter(folder, manifest, dtype, prompts, embed_token)
    model, tokenizer = _load_plain(folder, dtype)
    token = embed_token or (manifest.embed_token if manifest else EMBED_TOKEN)
    if token not in tokenizer.get_vocab():
        raise CheckpointError(
            f"{folder}: the tokenizer has no {token}; add it with: search-r3 init {folder} NEW_FOLDER "
            "(or name the model's own token with --embed-token)"
        )
    token_id = int(tokenizer.convert_tokens_to_ids(token))
    if manifest is not None and (manifest.embed_token, manifest.embed_token_id) != (token, token_id):
        raise CheckpointError(
            f"{folder / MANIFEST}: the embedding token is {manifest.embed_token} with id {manifest.embed_token_id}, "
            f"not {token} with id {token_id}; leave out --embed-token, or restore the file"
        )
    if manifest is not None and prompts is None:
        return model, tokenizer, manifest
    rendered = prompts if isinstance(prompts, Prompts) else render_prompts(tokenizer, prompts)
    if manifest is None:
        manifest = describe(folder, model, tokenizer, rendered, token, MaxTokens())
    else:
        manifest = manifest.model_copy(update={"prompts": rendered})
    return model, tokenizer, manifest


def _verify(folder: Path, manifest: Manifest) -> None:
    ours = folder.is_relative_to(cache_home())
    advice = f"delete {folder}, which is made anew" if ours else "restore or download the folder again"
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though {MANIFEST} lists it; {advice}")
        if sha256_file(path) != expected:
            raise CheckpointError(
                f"{path}: content does not match the hash in {MANIFEST} (truncated, damaged or changed); {advice}"
            )


def _load_plain(folder: Path, dtype: torch.dtype | Literal["auto"]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").exists():
        inner = folder / "model"
        hint = f"; this is a run, and its model is {inner}" if (inner / "config.json").exists() else ""
        raise CheckpointError(f"{folder}: no config.json; this is not a model folder{hint}")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no .safetensors weights; other formats can run code and are refused")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own types
        raise CheckpointError(f"{folder}: cannot load the model ({first_line(error)})") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: needs a fast tokenizer (tokenizer.json)")
    _check_family(folder, model.config.get_text_config())
    return model.eval(), tokenizer


def _check_family(folder: Path, config: Any) -> None:
    """Raises CheckpointError for what the engine cannot compute: states behind a prefix, or logits that are scaled."""
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    scaled = [name for name in LOGIT_SCALES if getattr(config, name, None) not in (None, 1)]
    if layers or scaled:
        what = f"has layers of {', '.join(sorted(layers))}" if layers else f"scales its logits ({scaled[0]})"
        raise CheckpointError(
            f"{folder}: {config.model_type} {what}; take a plain transformer, such as Qwen2.5 or Qwen3"
        )


def config_folder(source: str | Path) -> Path:
    """Local folder of the config.json and the tokenizer that a checkpoint has: of an adapter, its base's."""
    folder = resolve(source)
    if not (folder / "adapter_config.json").exists():
        return folder
    return config_folder(_adapted(folder, read_manifest(folder)))


def _adapted(folder: Path, manifest: Manifest | None) -> str:
    """Name of the checkpoint that an adapter changes."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        parent = manifest.parent.source if manifest and manifest.parent else config["base_model_name_or_path"]
        if not isinstance(parent, str) or not parent:
            raise ValueError(f"base_model_name_or_path is {parent!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json: does not name its base model ({error})") from error
    return parent


def _load_adapter(
    folder: Path,
    manifest: Manifest | None,
    dtype: torch.dtype | Literal["auto"],
    prompts: Prompts | SystemPrompts | None,
    embed_token: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Manifest]:
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").exists():
        raise CheckpointError(f"{folder}: no adapter_model.safetensors; other formats can run code and are refused")
    parent = _adapted(folder, manifest)
    model, tokenizer, base = load(resolve(parent), dtype, prompts=prompts, embed_token=embed_token)
    if parent not in OURS and manifest and manifest.parent and manifest.parent.weights_sha256 != base.weights_sha256:
        raise CheckpointError(f"{folder}: was trained on other weights than {parent} holds now; restore that base")
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:
        raise CheckpointError(f"{folder}: the adapter does not fit {parent} ({first_line(error)})") from error
    files = {**{f"base/{name}": value for name, value in base.files.items()}, **_hash_files(folder)}
    own = manifest if manifest and prompts is None else base  # `base` already carries prompts given by the caller
    training = base.training + (manifest.training if manifest else ())
    changed = {"prompts": own.prompts, "files": files, "training": training}
    merged_manifest = (manifest or base).model_copy(update=changed)
    logging.getLogger(__name__).info("merged adapter %s into %s", folder, parent)
    return merged.eval(), tokenizer, merged_manifest
