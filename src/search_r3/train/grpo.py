"""GRPO by TRL, with our rollouts, our packed forward pass and InfoNCE on the rollouts' vectors.

Only this file imports trl.

What is TRL's: advantages, clipping, variants of the loss, the divergence from the first policy, accumulation,
distribution, optimiser, saving. What is ours: a rollout arrives with its vector and reward (`rollouts`); the forward
pass reads the shared prompt once for all rollouts in memory and puts the embedding token where the policy stopped; the
same pass gives the vectors that InfoNCE is computed on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.utils.rnn import pad_sequence

from search_r3.errors import TrainingError
from search_r3.model.engine import Engine
from search_r3.model.reasoning import control_ids
from search_r3.records import Reasoned, Status
from search_r3.train.losses import anisotropy, info_nce
from search_r3.train.rl_config import RLRecipe
from search_r3.train.rollouts import Rollouter, RolloutPolicy, Rollouts, has_spread, repeated
from search_r3.train.run import shared_arguments
from search_r3.train.step import Forward

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOConfig, GRPOTrainer


class RetrievalGRPOTrainer(GRPOTrainer):
    """TRL's trainer in the retrieval environment.

    engine: of the model in training. rollouter: makes the rollouts of a step. policy: brought up to date before.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's describes a model that transformers' pipelines use, which a policy of ours is not."""

    def __init__(self, *, recipe: RLRecipe, engine: Engine, policy: RolloutPolicy, rollouter: Rollouter, **kwargs: Any):
        self.recipe, self.engine, self.policy, self.rollouter = recipe, engine, policy, rollouter
        self.rollouts: Rollouts | None = None
        self._control = control_ids(engine)
        self._vectors: Tensor | None = None
        self._targets: dict[str, Tensor] = {}
        self._unscorable = False
        if recipe.backend == "vllm":
            kwargs["args"].generation_kwargs = {"stop_token_ids": sorted(self._control)}
        super().__init__(reward_funcs=[total], rollout_func=_roll_out, processing_class=engine.tokenizer, **kwargs)
        self._packed = Forward(engine)
        if self.ref_model is not None:  # TRL loads it by name, which is the base's where the policy was an adapter
            reference = self.accelerator.unwrap_model(self.ref_model)
            set_model_state_dict(reference, engine.model.state_dict(), options=StateDictOptions(full_state_dict=True))
            self._packed.watch(reference)

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first step: one pass of one token with everything trainable.

        FSDP settles in its first pass in which precision it hands out gradients. TRL's first is the reference's, with
        adapters off, when nothing seems to want any.
        """
        packed, ids = self._packed.pack("reason", [[self.engine.embed_token_id]])
        self._packed.run(self.model, ids, packed)

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def roll_out(self, names: Sequence[str]) -> dict[str, Any]:
        """TRL's `rollout_func`: the rollouts of a step, and their rewards as a column of their own."""
        self.policy.sync(self.accelerator.unwrap_model(self.model))
        samples = self.recipe.group.samples
        found = self.rollouts = self.rollouter(names[::samples], self.state.global_step + 1)
        rewards = [scored.total for scored in found.scored]
        self._note(found)
        prefix = self.engine.prefix_ids("reason")
        queries = [episode.query for episode in found.episodes]
        tails = self.engine.tails(queries, "reason", self.recipe.group.query_tokens)
        self._prepare_contrast(found)
        return {
            "prompt_ids": [prefix + tail for tail in tails],
            "completion_ids": [list(episode.reasoned.token_ids) for episode in found.episodes],
            # TRL reads the sampler's probabilities with vLLM only; ours are put in below.
            "logprobs": [list(e.reasoned.logprobs) for e in found.episodes] if self.use_vllm else None,
            "given_reward": rewards,
        }

    def write(self, queries: Sequence[str], seed: int, first_row: int) -> list[Reasoned]:
        """Reasonings by TRL's own generation (transformers or vLLM); their vectors by one forward pass of ours."""
        prefix, samples = self.engine.prefix_ids("reason"), self.recipe.group.samples
        torch.manual_seed(seed + first_row)
        tails = self.engine.tails(queries, "reason", self.recipe.group.query_tokens)
        tails = [tail for tail in tails for _ in range(samples)]
        with self.accelerator.autocast():
            written, logprobs = self._generate_single_turn([prefix + tail for tail in tails], None, {}, samples)
        token, texts = self.engine.embed_token_id, []
        for number, ids in enumerate(written):
            end = next((place + 1 for place, one in enumerate(ids) if one in self._control), len(ids))
            written[number] = ids[:end]
            if logprobs is not None:
                logprobs[number] = logprobs[number][:end]
            texts.append([one for one in ids[:end] if one not in self._control])
        vectors = self.policy.engine.encode([a + b for a, b in zip(tails, texts, strict=True)], "reason")
        return [
            Reasoned(
                self.engine.tokenizer.decode(said).strip(),
                vectors[number],
                tuple(written[number]),
                tuple(logprobs[number]) if logprobs is not None else (),
                Status.FINISHED if written[number][-1] == token else Status.FORCED,
            )
            for number, said in enumerate(texts)
        ]

    def _note(self, found: Rollouts) -> None:
        """Figures of the rollouts of all processes for the log; TRL averages them over the steps of a log line."""
        metrics, lengths = self._metrics["train"], [len(e.reasoned.token_ids) for e in found.episodes]
        ranks = [outcome.relevant[0].rank for outcome in found.outcomes]
        vectors = torch.tensor(np.stack([e.reasoned.vector for e in found.episodes]))
        samples = self.recipe.group.samples
        groups = [found.scored[n : n + samples] for n in range(0, len(ranks), samples)]
        spreads = [np.std([s.rank for s in group if s.rank is not None] or [0.0]) for group in groups]
        figures = {
            "reward_rank": _mean([s.rank for s in found.scored]),
            "reward_rank_spread": float(np.mean(spreads)),
            "zero_spread": float(np.mean([not has_spread(group) for group in groups])),
            "not_scorable": float(np.mean([s.total is None for s in found.scored])),
            "format_rate": _mean([s.format for s in found.scored]),
            "forced_rate": float(np.mean([e.reasoned.status is Status.FORCED for e in found.episodes])),
            "length": float(np.mean(lengths)),
            "repeated": float(np.mean([repeated(e.reasoned.text) for e in found.episodes])),
            "reciprocal_rank": float(np.mean([1 / rank for rank in ranks])),
            "anisotropy": float(anisotropy(vectors)),
            "resampled": float(found.resampled),
        } | {f"environment_{name}": value for name, value in self.rollouter.environment.report().items()}
        shares = self.rollouter.gather([figures])
        for name in figures:
            metrics[name].append(_mean([share[name] for share in shares if np.isfinite(share[name])]))
        self._unscorable = all(share["not_scorable"] == 1 for share in shares)

    # --- forward pass -------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """TRL's forward pass, packed: log-probabilities and entropies (B, C) of the tokens that the policy chose.

        input_ids, attention_mask: (B, P+C). A control token that the policy chose is scored as chosen, but read as the
        embedding token, for that is what the rollout's vector was computed on; where it chose none, one is appended.
        """
        parts = []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(start, start + (batch_size or len(input_ids)))
            parts.append(self._packed_pass(model, input_ids[rows], attention_mask[rows], logits_to_keep))
        self._vectors = torch.cat([part[2] for part in parts])
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), None

    def _packed_pass(
        self, model: torch.nn.Module, input_ids: Tensor, mask: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        skip, token = len(self.engine.prefix_ids("reason")), self.engine.embed_token_id
        texts, said = [], []
        for ids, kept in zip(input_ids.tolist(), mask.bool().tolist(), strict=True):
            prompt = [one for one, real in zip(ids[:-width], kept[:-width], strict=True) if real][skip:]
            chosen = [one for one, real in zip(ids[-width:], kept[-width:], strict=True) if real]
            spoken = chosen[:-1] if chosen[-1] in self._control else chosen
            texts.append([*prompt, *spoken, token])
            said.append(chosen)
        packed, ids = self._packed.pack("reason", texts)
        labels = torch.full_like(ids, -100)  # (1, N): the token to be scored after each position
        places = []
        for end, chosen in zip(packed.ends.tolist(), said, strict=True):
            first = end - len(chosen) - (chosen[-1] not in self._control)
            places.append(torch.arange(first, first + len(chosen), device=ids.device))
            labels[0, places[-1]] = torch.tensor(chosen, device=ids.device)
        with self.accelerator.autocast():
            output, vectors = self._packed.run(model, ids, packed, shift_labels=labels, fused_lm_head=True)

        def rows(values: Tensor) -> Tensor:
            padded = pad_sequence([values[0, place] for place in places], batch_first=True)
            return torch.nn.functional.pad(padded, (0, width - padded.shape[1]))

        logps = rows(output.log_probs)
        return logps, torch.zeros_like(logps) if output.entropy is None else rows(output.entropy), vectors

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As TRL's: rollouts if due, forward and backward. Raises TrainingError where memory is too small."""
        try:
            step: Tensor = super().training_step(*args, **kwargs)
            return step
        except torch.OutOfMemoryError as error:
            group, also = self.recipe.group, ""
            if self.recipe.backend == "ours" and group.decode_rows > group.samples:
                also = f", or group.decode_rows (now {group.decode_rows}) if it is the writing that does not fit"
            raise TrainingError(
                f"out of memory in step {self.state.global_step + 1}; halve group.micro (now {group.micro}){also}: "
                "go on with --resume --allow-change --set group.micro=..."
            ) from error

    # --- loss ---------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL shuffles the rollouts of a step; the number of each goes along, and how probable its decoder found it.

        The old policy is the one that wrote, with weights merged and rounded as the decoder has them, so that the ratio
        and its clipping correct for that.
        """
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        ids = output["completion_ids"]
        output["rollout"] = torch.arange(len(ids), device=ids.device)
        if self.recipe.backend == "ours":
            assert self.rollouts is not None
            written = [torch.tensor(episode.reasoned.logprobs) for episode in self.rollouts.episodes]
            padded = pad_sequence(written, batch_first=True).to(ids.device)
            output["old_per_token_logps"] = torch.nn.functional.pad(padded, (0, ids.shape[1] - padded.shape[1]))
        if self._unscorable:
            raise TrainingError(
                f"step {self.state.global_step + 1}: no rollout could be scored (all rewards are None); nothing was "
                "updated. Look at reward.rank and at the judgements of these queries"
            )
        return output

    def _prepare_contrast(self, found: Rollouts) -> None:
        """Documents for InfoNCE: everything encoded in this step, and each rollout's relevant documents."""
        environment = self.rollouter.environment
        index = environment.ready()
        relevant = [environment.relevant[episode.query_id][0] for episode in found.episodes]
        every = self.rollouter.gather([np.unique(np.concatenate(relevant))])
        rows = np.unique(np.concatenate([environment.fresh_rows(), *every]))
        best = []
        for episode, numbers in zip(found.episodes, relevant, strict=True):
            cosines = index.read(numbers) @ episode.reasoned.vector
            best.append(np.searchsorted(rows, numbers[int(cosines.argmax())]))
        known = np.stack([np.isin(rows, numbers) for numbers in relevant])
        self._targets = {
            name: torch.as_tensor(value, device=self.accelerator.device)
            for name, value in (("documents", index.read(rows)), ("positives", np.array(best)), ("known", known))
        }

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss + lambda * InfoNCE of these rollouts' vectors, averaged over accumulation steps as TRL's is."""
        loss: Tensor = super()._compute_loss(model, inputs)
        weight, vectors = self.recipe.objective.info_nce, self._vectors
        assert vectors is not None
        rows, targets = inputs["rollout"], self._targets
        with torch.set_grad_enabled(weight > 0):
            contrast = info_nce(
                vectors,
                targets["documents"],
                targets["positives"][rows],
                targets["known"][rows],
                temperature=self.recipe.objective.temperature,
                false_negative_margin=self.recipe.objective.false_negative_margin,
            )
        self._metrics["train"]["info_nce"].append(self.accelerator.gather(contrast.detach()).mean().item())
        if weight:
            loss = loss + weight * contrast / self.current_gradient_accumulation_steps
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite; nothing was updated. Start anew with a "
                "lower learning_rate"
            )
        return loss


def total(*, given_reward: list[float | None], **columns: Any) -> list[float | None]:
    """The reward that came with each rollout."""
    return given_reward


def _roll_out(names: list[str], trainer: RetrievalGRPOTrainer) -> dict[str, Any]:
    return trainer.roll_out(names)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def arguments(recipe: RLRecipe, output: Path, processes: int, progress: bool) -> GRPOConfig:
    """TRL's settings for a recipe. Raises TrainingError for sizes that do not fit the number of processes."""
    group = recipe.group
    mine = group.queries * group.samples // processes
    if group.queries % processes or mine % group.micro:
        raise TrainingError(
            f"group.queries ({group.queries}) must be a multiple of the {processes} processes, and group.micro "
            f"({group.micro}) must divide the {mine} rollouts of each"
        )
    goal = recipe.objective
    if goal.variant == "bnpo" and group.micro < group.queries * group.samples:
        raise TrainingError(
            f"objective.variant bnpo averages over each group.micro ({group.micro}) of each process; that must be all "
            f"{group.queries * group.samples} rollouts of a step, so on one process"
        )
    return GRPOConfig(
        **shared_arguments(recipe, output, progress),
        per_device_train_batch_size=group.micro,
        gradient_accumulation_steps=mine // group.micro,
        steps_per_generation=mine // group.micro,
        num_generations=group.samples,
        max_completion_length=group.reasoning_tokens,
        temperature=recipe.sampling_temperature,
        top_p=recipe.top_p,
        loss_type=goal.variant,
        epsilon=goal.clip,
        epsilon_high=goal.clip_high + (goal.variant == "cispo"),  # which caps the ratio itself
        scale_rewards=goal.scale,
        beta=goal.beta,
        mask_truncated_completions=False,
        shuffle_dataset=False,  # `plan` has chosen the order
        use_vllm=recipe.backend == "vllm",
        vllm_mode="colocate",
        lr_scheduler_type="constant_with_warmup",
        log_completions=False,
    )
