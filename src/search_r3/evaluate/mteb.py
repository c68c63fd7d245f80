"""Our models as mteb sees them: an encoder for all its tasks, and a search engine, with an index, for retrieval."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from mteb.types import PromptType

from search_r3 import __version__
from search_r3.errors import DataError, first_line
from search_r3.evaluate.collection import load_collection
from search_r3.model.search_r3 import SearchR3
from search_r3.records import Document
from search_r3.retriever import Retriever


class MtebEncoder:
    """`EncoderProtocol`: queries with or without reasoning, everything else as documents.

    model_name: a checkpoint of ours, or a loaded model. reason: think about queries before embedding them, `samples`
    times; only retrieval tasks tell queries apart. An empty text gets a vector of zeros: it resembles nothing.
    """

    def __init__(
        self,
        model_name: str | SearchR3,
        revision: str | None = None,
        *,
        device: str | None = None,
        reason: bool = False,
        samples: int = 1,
        **kwargs: Any,
    ):
        loaded = isinstance(model_name, SearchR3)
        self.model: SearchR3 = model_name if loaded else SearchR3.from_pretrained(model_name, device=device, **kwargs)  # type: ignore[assignment,arg-type]
        self.reason, self.samples = reason or samples > 1, samples

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **kwargs: Any) -> np.ndarray:
        """(N, D) float32 vectors of all texts of a DataLoader of mteb's batches."""
        texts = [text for batch in inputs for text in _texts(batch)]
        vectors = np.zeros((len(texts), self.model.dimension), np.float32)
        there = [number for number, text in enumerate(texts) if text.strip()]
        given = [texts[number] for number in there]
        if prompt_type == PromptType.query:
            vectors[there] = self.model.encode_queries(given, reason=self.reason, samples=self.samples)
        else:
            vectors[there] = self.model.encode_documents(given)
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of all pairs."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of corresponding rows."""
        return pairwise_cos_sim(embeddings1, embeddings2)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What is known of the model."""
        several = {"samples": self.samples} if self.samples > 1 else {}
        return _meta(self.model, {"reason": self.reason, **several}, "dense")


class MtebSearch:
    """`SearchProtocol`: our index, for retrieval tasks.

    reason, fuse, hybrid: see `Retriever.search_many`. The index lives in a temporary folder, one corpus at a time.
    """

    def __init__(self, model: SearchR3, *, reason: bool = False, fuse: float | None = None, hybrid: bool = False):
        self.model, self.reason, self.fuse, self.hybrid = model, reason, fuse, hybrid
        self._retriever: Retriever | None = None
        self._remove: Callable[[], object] = lambda: None

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Index a corpus of mteb's; empty documents are left out."""
        self.close()
        folder = tempfile.mkdtemp(prefix="search-r3-mteb-")
        self._remove = weakref.finalize(self, shutil.rmtree, folder, True)
        self._retriever = Retriever.create(Path(folder) / "index", self.model)
        documents = (Document(row["id"], row["text"], row.get("title") or "") for row in corpus)
        self._retriever.add((document for document in documents if document.content.strip()), batch=256)

    def search(
        self,
        queries: Any,
        *,
        top_k: int,
        top_ranked: dict[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """Scores of the best documents by query and document; of a query's candidates only, where there are some."""
        if self._retriever is None:
            raise RuntimeError("search: index a corpus first")
        names, texts = [row["id"] for row in queries], [_query(row) for row in queries]
        k = max(1, len(self._retriever.store) if top_ranked else top_k)
        found = self._retriever.search_many(texts, k, reason=self.reason, fuse=self.fuse, hybrid=self.hybrid)
        results = {name: {hit.id: hit.score for hit in one.hits} for name, one in zip(names, found, strict=True)}
        if top_ranked:
            results = {
                name: {document: scores[document] for document in top_ranked[name] if document in scores}
                for name, scores in results.items()
            }
        return results

    def close(self) -> None:
        """Remove the index."""
        if self._retriever is not None:
            self._retriever.close()
            self._retriever = None
        self._remove()

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What is known of the model."""
        settings = {"reason": self.reason, "fuse": self.fuse, "hybrid": self.hybrid}
        return _meta(self.model, settings, "hybrid" if self.hybrid else "dense")


def task_of(folder: Path, split: str = "test") -> AbsTaskRetrieval:
    """A retrieval task of mteb's over a BEIR folder, with nothing to fetch."""
    collection = load_collection(folder, split)

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=_task_name(collection.name),
            description=f"The BEIR folder {collection.name}.",
            reference=None,
            dataset={"path": collection.name, "revision": "local"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=[split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            documents = [{"id": d.id, "title": d.title, "text": d.text} for d in collection.documents]
            queries = [{"id": query.id, "text": query.text} for query in collection.queries]
            parts = {
                "corpus": Dataset.from_list(documents),
                "queries": Dataset.from_list(queries),
                "relevant_docs": collection.judgements,
                "top_ranked": None,
            }
            self.dataset = {"default": {split: parts}}
            self.data_loaded = True

    return Local()


def run(
    model: SearchR3,
    names: Sequence[str],
    output: Path,
    *,
    reason: bool = False,
    samples: int = 1,
    split: str | None = None,
) -> dict[str, float]:
    """Main scores of tasks, by name of mteb's or by BEIR folder; mteb's own result files are written to `output`.

    split: default, the task's own, and `test` of a folder. Raises DataError for a task that does not exist, cannot be
    loaded or is named twice.
    """
    import mteb
    from mteb.cache import ResultCache

    tasks: dict[str, Any] = {}
    for name in names:
        try:
            if Path(name).is_dir():
                task = task_of(Path(name), split or "test")
            else:
                task = mteb.get_task(name, eval_splits=[split] if split else None)
        except (KeyError, ValueError) as error:
            raise DataError(f"--mteb {name}: neither a BEIR folder nor a task of mteb's ({error})") from error
        if split and split not in task.metadata.eval_splits:
            raise DataError(f"--split {split}: {name} is tested on {', '.join(task.metadata.eval_splits)}")
        if tasks.setdefault(task.metadata.name, task) is not task:
            raise DataError(f"--mteb {name}: a second {task.metadata.name}, whose results would replace the first's")
    scores = {}
    for name, task in tasks.items():
        try:
            result = mteb.evaluate(
                MtebEncoder(model, reason=reason, samples=samples),
                task,
                cache=ResultCache(cache_path=output),
                overwrite_strategy="always",  # a result of other settings or data is none of this run's
                show_progress_bar=False,
                co2_tracker=False,
            )
        except (OSError, ConnectionError) as error:
            raise DataError(f"--mteb {name}: its data cannot be fetched ({first_line(error)})") from error
        scores[name] = float(result.task_results[0].get_score())
    return scores


def _texts(batch: dict[str, Any]) -> Iterator[str]:
    """A batch's texts; documents as we join title and body."""
    titles = batch.get("title")
    bodies = batch.get("body")
    if titles is None or bodies is None:
        yield from batch["text"]
        return
    for title, body in zip(titles, bodies, strict=True):
        yield Document("", body, title or "").content


def _query(row: dict[str, Any]) -> str:
    return f"{row['instruction']} {row['text']}".strip() if row.get("instruction") else str(row["text"])


def _task_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.replace("_", "-").split("-"))


def _meta(model: SearchR3, settings: dict[str, Any], kind: str) -> ModelMeta:
    manifest = model.manifest
    name = Path(model.source).name or "model"
    shown = "-".join([name, *(key if value is True else f"{key}{value}" for key, value in settings.items() if value)])
    return ModelMeta(
        loader=MtebEncoder,
        name=f"search-r3/{shown}",
        revision=manifest.weights_sha256[:12],
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=sum(parameter.numel() for parameter in model.engine.model.parameters()),
        memory_usage_mb=None,
        max_tokens=manifest.max_tokens.document,
        embed_dim=model.dimension,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        model_type=[kind],
        experiment_kwargs={"search_r3": __version__, **settings},
    )
