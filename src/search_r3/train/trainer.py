"""A transformers Trainer whose loss is stage 1's; everything else (optimiser, precision, distribution, saving,
resuming, reporting) is the library's."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer

from search_r3.errors import TrainingError
from search_r3.model.engine import Engine
from search_r3.train.config import Recipe
from search_r3.train.losses import anisotropy, distillation, info_nce, kl_to_base, sft_nll, triplet_margin, uniformity
from search_r3.train.run import sharded
from search_r3.train.step import ChunkOutput, Forward, StepBatch, chunks
from search_r3.train.teacher import Teacher


class SupervisedTrainer(Trainer):
    """Overrides `compute_loss`, and `log` to add the terms of the loss to what is logged.

    reference: a frozen copy of the base model for the KL term; None where the model is its own base with its adapter
    switched off. teacher: for the distillation term; None leaves it out.
    """

    def __init__(
        self,
        *args: Any,
        recipe: Recipe,
        engine: Engine,
        reference: torch.nn.Module | None = None,
        teacher: Teacher | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.recipe, self.engine, self.reference, self.teacher = recipe, engine, reference, teacher
        self._forward = Forward(engine, recipe.shared_prefix)
        if reference is not None:
            self._forward.watch(reference)
        self._terms: dict[str, list[float]] = {}
        self._seconds = 0.0
        self.sharded = sharded(self.accelerator)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's, forward and backward. Raises TrainingError for both where memory is too small."""
        started = time.perf_counter()
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory in step {self.state.global_step + 1}; halve batch.chunk_tokens "
                f"(now {self.recipe.batch.chunk_tokens}), which changes no result: go on with --resume --allow-change "
                "--set batch.chunk_tokens=..."
            ) from error
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()  # the backward pass is only queued
        self._seconds += time.perf_counter() - started
        return loss

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of one step's batch; see `losses` for its terms and `step` for the cached way to its gradient.

        Gradients of all chunks but the last are added here; the returned tensor carries the last chunk's, so that the
        Trainer's own backward pass ends the step and, where there are several processes, synchronises them.
        """
        batch: StepBatch = inputs["batch"]
        limit, world = self.recipe.batch.chunk_tokens, self.accelerator.num_processes
        parts = self._even(chunks(batch.turns, limit))
        tokens = sum(len(turn.ids) for turn in batch.turns)
        whole = len(parts) == 1 or (world == 1 and tokens <= limit)
        # Every process averages over the learned tokens of all; distributed training then averages the gradients.
        learned = self._sum(sum(turn.targets for turn in batch.turns))
        plain = self._sum(sum(turn.targets - 1 for turn in batch.turns if turn.targets))
        outputs: list[ChunkOutput] = []
        for number, part in enumerate(parts):  # where all fits at once this pass already carries the gradient
            with torch.set_grad_enabled(whole):
                outputs.append(self._pass(model, batch, part))
            if not whole:
                outputs[number] = ChunkOutput(outputs[number].vectors, outputs[number].logits[:0], learned.new_empty(0))
        order = torch.tensor([n for part in parts for n in part], device=self.engine.device).argsort()
        vectors = torch.cat([output.vectors for output in outputs])[order]  # (turns, D)
        if not whole:
            vectors.requires_grad_()
        contrastive, terms = self._contrastive(vectors, batch)
        if not torch.isfinite(contrastive):
            self._not_finite(batch)
        if whole:
            language = torch.stack(
                [
                    self._language(model, batch, part, output, learned, plain, terms)
                    for part, output in zip(parts, outputs, strict=True)
                ]
            ).sum()
            loss = world * contrastive + world * language
            total = contrastive.detach() + world * language.detach()
        else:
            (gradient,) = torch.autograd.grad(world * contrastive, vectors)
            total = contrastive.detach()
            for number, part in enumerate(parts):
                last = number + 1 == len(parts)
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    output = self._pass(model, batch, part)
                    language = self._language(model, batch, part, output, learned, plain, terms)
                    loss = (output.vectors * gradient[part]).sum() + world * language
                    total = total + world * language.detach()
                    if not last:
                        self._accumulate(loss / self.current_gradient_accumulation_steps)
        if not torch.isfinite(total):
            self._not_finite(batch)
        self._note(terms, batch, vectors.detach())
        result: Tensor = loss + (total - loss).detach()  # the gradient of one, the value of the other
        return result

    def _accumulate(self, loss: Tensor) -> None:
        """A backward pass after which DeepSpeed does not make its step yet."""
        state = self.accelerator.gradient_state
        due = state.sync_gradients
        state._set_sync_gradients(False)
        self.accelerator.backward(loss)
        state._set_sync_gradients(due)

    def _even(self, parts: list[list[int]]) -> list[list[int]]:
        """As many chunks as the process with the most has, the added ones empty."""
        if not self.sharded:
            return parts
        most = self.accelerator.gather(torch.tensor([len(parts)], device=self.engine.device)).max()
        return parts + [[] for _ in range(int(most) - len(parts))]

    def _pass(self, model: torch.nn.Module, batch: StepBatch, part: list[int]) -> ChunkOutput:
        """One chunk's pass; of an empty one, any text's, with nothing of it counting."""
        output = self._forward(model, [batch.turns[n] for n in part or [0]])
        return output if part else ChunkOutput(output.vectors[:0], 0.0 * output.logits, output.targets[:0])

    def _not_finite(self, batch: StepBatch) -> None:
        names = ", ".join(f"{example.source}:{example.id}" for example in batch.examples[:8])
        raise TrainingError(
            f"step {self.state.global_step + 1}: the loss is not finite; nothing was updated. Start anew with a lower "
            f"learning_rate, or look at the batch: queries {names}, ..."
        )

    def _sum(self, count: int) -> Tensor:
        """A count summed over all processes; at least 1."""
        total = torch.tensor(count, device=self.engine.device)
        summed: Tensor = self.accelerator.reduce(total, "sum")
        return summed.clamp(min=1)

    def _language(
        self,
        model: torch.nn.Module,
        batch: StepBatch,
        part: list[int],
        output: ChunkOutput,
        learned: Tensor,
        plain: Tensor,
        terms: dict[str, Tensor],
    ) -> Tensor:
        """SFT and KL terms of one chunk, weighted, as its share of the step's means."""
        weights, count = self.recipe.loss, len(output.targets)
        # Every parameter takes part in every pass, as distributed training needs.
        loss = 0.0 * output.logits.float().sum()
        if weights.sft and count:
            nll = sft_nll(output.logits, output.targets) * (count / learned)
            loss = loss + weights.sft * nll
            terms["sft"] = terms.get("sft", 0) + self.accelerator.num_processes * nll.detach()
        spoken = output.targets != self.engine.embed_token_id  # the base has never been taught the embedding token
        if weights.kl and (spoken.any() or self.sharded):
            with torch.no_grad(), self._base(model) as base, self.accelerator.autocast():
                expected = self._pass(base, batch, [n for n in part if batch.turns[n].targets]).logits
            if spoken.any():
                kl = kl_to_base(expected[spoken], output.logits[spoken]) * (spoken.sum() / plain)
                loss = loss + weights.kl * kl
                terms["kl"] = terms.get("kl", 0) + self.accelerator.num_processes * kl.detach()
        return loss

    @contextlib.contextmanager
    def _base(self, model: torch.nn.Module) -> Any:
        if self.reference is not None:
            yield self.reference
            return
        bare = self.accelerator.unwrap_model(model)  # a wrapper's pass may wait for processes that make none
        with bare.disable_adapter():
            yield bare

    def _contrastive(self, vectors: Tensor, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE, triplet and distillation, weighted, over the texts of all processes; gradient reaches this one's."""
        weights = self.recipe.loss
        direct, reasoned, stored = vectors.split([len(batch.examples), len(batch.thinking), len(batch.documents)])
        thinking = batch.thinking if weights.reasoned else []
        mine = direct, reasoned[: len(thinking)], stored
        shares: list[dict[str, Any]] = gather_object(
            [
                {
                    "relevant": [example.relevant | {example.positive.id} for example in batch.examples],
                    "thinking": thinking,
                    "documents": batch.documents,
                    "hard": batch.hard,
                    "vectors": [part.detach().cpu() for part in mine],
                    "taught": self.teacher(*batch.read).cpu() if self.teacher and batch.read else None,
                }
            ]
        )
        rank = self.accelerator.process_index
        everything = [
            mine if number == rank else [part.to(vectors.device) for part in share["vectors"]]
            for number, share in enumerate(shares)
        ]
        queries = torch.cat([part for share in everything for part in (share[0], share[1])])
        documents = torch.cat([share[2] for share in everything])
        names = [name for share in shares for name in share["documents"]]
        positives, relevant, pairs, base, line = [], [], [], 0, 0
        for share in shares:
            asked = [*range(len(share["relevant"])), *share["thinking"]]
            positives += [base + example for example in asked]
            relevant += [share["relevant"][example] for example in asked]
            lines: dict[int, list[int]] = {}
            for place, example in enumerate(asked):
                lines.setdefault(example, []).append(line + place)
            pairs += [(n, base + e, base + d) for e, d in share["hard"] for n in lines[e]]
            base += len(share["documents"])
            line += len(asked)
        known = torch.tensor([[name in found for name in names] for found in relevant], device=vectors.device)
        targets = torch.tensor(positives, device=vectors.device)
        terms: dict[str, Tensor] = {}
        terms["info_nce"] = info_nce(
            queries,
            documents,
            targets,
            known,
            temperature=weights.temperature,
            false_negative_margin=weights.false_negative_margin,
        )
        loss = weights.info_nce * terms["info_nce"]
        if pairs and weights.triplet:
            q, p, n = torch.tensor(pairs, device=vectors.device).T
            terms["triplet"] = triplet_margin(queries[q], documents[p], documents[n], margin=weights.margin)
            loss = loss + weights.triplet * terms["triplet"]
        if self.teacher:
            rows, columns = [], []
            for share in shares:
                count = len(share["relevant"])
                rows += [share["taught"][:count], share["taught"][share["thinking"]]]
                columns.append(share["taught"][count:])
            taught = torch.cat(columns)  # (C, D)
            same = torch.tensor([[one == other for other in names] for one in names], device=vectors.device)
            terms["distillation"] = distillation(
                torch.cat([queries, documents]) @ documents.T,
                (torch.cat([*rows, taught]) @ taught.T).to(vectors.device),
                torch.cat([torch.zeros_like(known), same]),
                temperature=weights.temperature,
                teacher_temperature=weights.teacher_temperature,
            )
            loss = loss + weights.distillation * terms["distillation"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def _note(self, terms: dict[str, Tensor], batch: StepBatch, vectors: Tensor) -> None:
        documents = vectors[-len(batch.documents) :]
        terms = terms | {"anisotropy": anisotropy(documents), "uniformity": uniformity(documents)}
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(float(term))
        self._terms.setdefault("tokens", []).append(sum(len(turn.ids) for turn in batch.turns))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the terms since the last time, and tokens a second of this process's steps."""
        if "loss" in logs and self._terms:
            tokens = sum(self._terms.pop("tokens"))
            logs = logs | {name: sum(values) / len(values) for name, values in self._terms.items()}
            logs["tokens_per_s"] = tokens / self._seconds
            self._terms, self._seconds = {}, 0.0
        super().log(logs, *args, **kwargs)
