"""`transformers.Trainer` for packs of samples: the loss per token, exact resumption, whole checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..model.packing import IGNORE, PADDING, TARGET
from ..pipeline.records import replaced
from .arguments import Echo4oTrainingArguments
from .checkpoints import (
    Run,
    check_run,
    keep_newest,
    last_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    whole_files,
    whole_folder,
)
from .collator import PackCollator
from .ema import Averaging, WeightAverage
from .latents import LatentEncoder
from .optimizers import MuonBeside, layer_matrices
from .packs import EagerPacks, PackSampler, StreamedPacks
from .sharding import bfloat16_policy, drop_gathered, tables_apart

logger = logging.get_logger(__name__)

AVERAGE = "average.safetensors"
POSITION = "position_{rank}.pt"
LEFT_OUT = "left_out.jsonl"
NOT_FOR_THE_MODEL = ("pictures", "ids", "left_out")
SHOWN = 8  # ids in an error's message


class Echo4oTrainer(Trainer):
    """`Trainer` for packs, which hold different numbers of tokens of two kinds.

    The loss of a step is flow_weight * (sum of flow losses) / (target tokens) + text_weight * (sum of text losses) /
    (labelled tokens), with sums and counts over all its packs, those of other processes included.

    A run that was killed and goes on from a checkpoint ends, on a CPU, with the same bits as one that never was. With
    another number of processes it sees the same packs in the same steps as long as processes * accumulation steps stay
    what they were (losses then differ by rounding), except a stream, whose position holds for its processes alone.

    Args:
        model: what is trained has `requires_grad`; plain or a `PeftModel`.
        args: settings.
        train_dataset: packs.
        data_collator: makes a batch of a pack.
        encoder: makes the latents that the collator could not take from a store.
        processing_class: the processor, saved with the model.
        callbacks: as upstream.
        trainer_options: further arguments of `Trainer`.

    Attributes:
        average: of the trained weights, with `ema_decay`; None before training.

    Raises:
        ValueError: settings that do not go together.
    """

    loss_is_scaled_for_ga = True  # by `compute_loss`, over all packs of a step
    args: Echo4oTrainingArguments
    optimizer: torch.optim.Optimizer | None
    _tr_loss: Tensor

    def __init__(
        self,
        model: nn.Module,
        args: Echo4oTrainingArguments,
        *,
        train_dataset: EagerPacks | StreamedPacks,
        data_collator: PackCollator,
        encoder: LatentEncoder,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **trainer_options: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: start one for each with accelerate launch")
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = not data_collator.always_all_parts
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            processing_class=processing_class,
            callbacks=None if callbacks is None else list(callbacks),
            **trainer_options,
        )
        if self.is_deepspeed_enabled and args.muon:
            raise ValueError("muon needs whole matrices, which DeepSpeed takes apart; train with DDP or FSDP2")
        if self.is_deepspeed_enabled and args.ema_decay and args.hf_deepspeed_config.is_zero3():
            raise ValueError("ema_decay does not go with DeepSpeed ZeRO-3; train with FSDP2")
        if self.is_fsdp_enabled and args.bf16:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = bfloat16_policy()
        self.encoder = encoder
        self._apart = ExitStack()  # what is no part of the model's state while FSDP takes it apart
        self.average: WeightAverage | None = None
        self._streamed = isinstance(train_dataset, StreamedPacks)
        self._stream: Any = None  # a StatefulDataLoader
        self._stream_position: dict[str, Any] | None = None  # after the last step
        self._unfinished: Path | None = None  # where a checkpoint is being written
        self._resumed: dict[str, Any] | None = None  # what this process saved in the checkpoint that is resumed
        self._run = Run(
            processes=args.world_size,
            accumulation=args.gradient_accumulation_steps,
            seed=args.seed,
            packs=len(train_dataset) if isinstance(train_dataset, EagerPacks) else None,
            workers=args.dataloader_num_workers if self._streamed else None,
        )
        self._left_out: dict[str, str] = {}
        self._step_ids: list[str] = []
        # Since the last log: sums of the flow and text losses, what they are of, and all tokens.
        self._sums = torch.zeros(5, device=args.device)
        self._last_log = time.monotonic()

    # ------------------------------------------------------------------------------------------------------- the loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The packs of a step, and its counts of target and labelled tokens (2,)."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_ids = [id for batch in batches for id in batch.get("ids", [])]
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        counts = torch.stack([torch.zeros(2, dtype=torch.long), *map(_counts, batch_samples)]).sum(0)
        return cast(Tensor, self.accelerator.reduce(counts.to(device), reduction="sum"))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """What a pack adds to the loss of its step.

        Args:
            model: as it is wrapped.
            inputs: what `PackCollator` gives; latents that are missing are encoded.
            return_outputs: also return the model's output.
            num_items_in_batch: target and labelled tokens of the step (2,); without it, those of this pack.

        Raises:
            ValueError: the loss is not finite.
        """
        if inputs.get("pictures"):
            self.encoder.fill(inputs)
        batch = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        outputs = model(**batch, loss_reduction="none")
        own = _counts(batch).to(self._sums)
        counts = own if num_items_in_batch is None else num_items_in_batch.to(self._sums)
        text = outputs["text_loss"].sum()
        flow = outputs["flow_loss"].sum() if "flow_loss" in outputs else torch.zeros_like(text)
        sums = torch.stack([flow, text])
        weights = sums.new_tensor([self.args.flow_weight, self.args.text_weight])
        loss = (weights * sums / counts.clamp(min=1)).sum()
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} {self._where(inputs.get('ids', []))}")
        if model.training:
            tokens = (batch["segment_ids"] != PADDING).sum()
            self._sums += torch.cat([sums.detach(), own, tokens[None].to(own)])
            self._left_out |= dict(inputs.get("left_out", []))
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which average their gradients
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Upstream's, before the optimizer's step: a gradient that is not finite must not reach the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        skips_steps = self.accelerator.scaler is not None  # fp16
        if grad_norm is not None and not skips_steps and not math.isfinite(grad_norm):
            raise ValueError(f"the norm of the gradient is {float(grad_norm)} {self._where(self._step_ids)}")
        return grad_norm

    def _where(self, ids: Sequence[str]) -> str:
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        step, rate = self.state.global_step + 1, self.args.learning_rate
        return (
            f"in step {step}, of the samples {', '.join(ids[:SHOWN])}{more}. Lower learning_rate={rate}, or look at "
            f"these samples. {last_checkpoint(self.args.output_dir)}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Upstream's, with both losses per token, and the tokens per second of all processes."""
        if "loss" in logs:
            sums = cast(Tensor, self.accelerator.reduce(self._sums, reduction="sum")).tolist()
            now = time.monotonic()
            for place, name in enumerate(("flow_loss", "text_loss")):
                if sums[2 + place]:
                    logs[name] = sums[place] / sums[2 + place]
            logs["tokens_per_second"] = sums[4] / (now - self._last_log)
            self._sums, self._last_log = torch.zeros_like(self._sums), now
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: upstream's rule takes both experts' weights times the tokens of one."""
        return 0

    # ------------------------------------------------------------------------------------------------------- the data

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return PackSampler(self.train_dataset, self.args.world_size * self.args.gradient_accumulation_steps)

    def get_train_dataloader(self) -> Any:
        """Upstream's for packs on disk; for a stream, one that knows its position."""
        # Loaders draw a seed when they are made, once more after resuming: not from the generator of dropouts.
        generator = torch.Generator()
        if not self._streamed:
            loader = super().get_train_dataloader()
            loader.base_dataloader.generator = generator
            return loader
        from torchdata.stateful_dataloader import StatefulDataLoader

        args = self.args
        self._stream = StatefulDataLoader(
            self.train_dataset,
            batch_size=1,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            generator=generator,
        )
        return self._stream

    # ------------------------------------------------------------------------------------------------------ optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Upstream's; with `muon`, for what is left beside it."""
        if self.optimizer is not None or not self.args.muon:
            return cast(torch.optim.Optimizer, super().create_optimizer(model))
        matrices = layer_matrices(self.model if model is None else model)
        for matrix in matrices:
            matrix.requires_grad_(False)  # upstream's leaves them out
        rest = super().create_optimizer(model)
        for matrix in matrices:
            matrix.requires_grad_(True)
        self.optimizer = MuonBeside(matrices, rest, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has its averaged weights inside, if there is an average, and its own again afterwards."""
        drop_gathered(self.model)
        with nullcontext() if self.average is None else self.average.applied():
            yield
            drop_gathered(self.model)

    # --------------------------------------------------------------------------------------------------- go on, save

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from a checkpoint on if one is given; `True` is the newest whole one, or the start if there is none.

        Raises:
            ValueError: the loss is not finite; the checkpoint cannot be gone on from.
            OSError: a checkpoint cannot be written, as on a full disk.
        """
        if self.args.should_save:
            remove_unfinished(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(self.args.output_dir)
            resume_from_checkpoint = None if newest is None else str(newest)
            if newest is None:
                logger.warning(f"{self.args.output_dir} holds no checkpoint: training starts at its first step")
        self._resumed = self._position_in(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._list_left_out()
        return output

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *others: Any) -> tuple[int, int]:
        """Upstream's: epochs and batches to skip; a stream knows its own position, and a finished run skips all."""
        epochs_done, batches_done = super()._init_training_state(max_steps, steps_per_epoch, epochs, *others)
        if self.state.global_step >= max_steps:
            return epochs, 0
        return epochs_done, 0 if self._streamed else batches_done

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        with self._apart:
            if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
                self._apart.enter_context(tables_apart(self.model, self.accelerator))
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.ema_decay is not None:
            self.average = WeightAverage(self.accelerator.unwrap_model(self.model), self.args.ema_decay)
            self.pop_callback(Averaging)  # of an earlier call
            self.add_callback(Averaging(self.average))
            if resume_from_checkpoint is not None:
                self.average.load(Path(resume_from_checkpoint) / AVERAGE)
        if self._resumed is not None:
            self._left_out = self._resumed["left_out"]
            if self._streamed and not self.args.ignore_data_skip:
                self._stream.load_state_dict(self._resumed["stream"])
        self._last_log = time.monotonic()
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._apart.close()  # the state is saved whole
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, **state: Any) -> None:
        if self._resumed is not None:  # a log after resuming is of all steps since the one before it
            self._sums[:4] = self._resumed["sums"][:4].to(self._sums)  # tokens are counted with the time
            self._tr_loss = self._resumed["loss"].to(self._tr_loss)
            self._globalstep_last_logged = self._resumed["last_logged"]
            self._resumed = None
        super()._run_epoch(**state)

    def _prepare_input(self, data: Any) -> Any:
        """Upstream's; DeepSpeed's would also round noise and timesteps, and the model casts what it must."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        if self._streamed:
            self.state.epoch = self.state.global_step / self.state.max_steps  # upstream's counts from the resumption
            self._stream_position = self._stream.state_dict()
        super()._maybe_log_save_evaluate(*arguments, **options)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Upstream's, in a place where nobody looks for checkpoints, and what resuming needs beyond it."""
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        barrier, may_write = self.accelerator.wait_for_everyone, self.args.should_save
        with whole_folder(folder, barrier, may_write) as place:
            self._unfinished = place
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            if not self.args.save_only_model:
                torch.save(self._position(), place / folder.name / POSITION.format(rank=self.args.process_index))
                if self.average is not None:
                    self.average.save(place / folder.name / AVERAGE, may_write)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if may_write:
            keep_newest(folder.parent, self.args.save_total_limit)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; outside checkpoints with the averaged weights, if there are any, and in whole files.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        if self._unfinished is not None:
            super().save_model(output_dir, _internal_call)
            return
        own, barrier = Path(self.args.output_dir), self.accelerator.wait_for_everyone
        folder = Path(output_dir) if output_dir else own
        with self.averaged(), self._gathered(), whole_files(folder, own, barrier, self.args.should_save) as place:
            super().save_model(str(place), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Weights that FSDP has sharded are saved in one piece."""
        if not self.is_fsdp_enabled:
            yield
            return
        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type(before)

    def _position(self) -> dict[str, Any]:
        """What this process needs to go on, beyond upstream's."""
        return {
            "run": asdict(self._run),
            "stream": self._stream_position,
            "left_out": self._left_out,
            "sums": self._sums.cpu(),
            "loss": self._tr_loss.cpu(),
            "last_logged": self._globalstep_last_logged,
        }

    def _position_in(self, checkpoint: Path) -> dict[str, Any]:
        """The position that this process saved; of a process that was not there, the first one's.

        Raises:
            OSError: there is none.
            ValueError: its steps stand for other data than those of this run.
        """
        paths = [checkpoint / POSITION.format(rank=rank) for rank in (self.args.process_index, 0)]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise OSError(f"{checkpoint} is no checkpoint to go on from: it has no {paths[1].name}")
        position: dict[str, Any] = torch.load(path, weights_only=True)
        check_run(checkpoint, Run(**position["run"]), self._run, must_go_on=not self.args.ignore_data_skip)
        return position

    def _list_left_out(self) -> None:
        """Count the samples that were left out in the log, and list them in a file."""
        left_out = {} if self._streamed else dict(self.train_dataset.left_out)
        for found in gather_object([self._left_out]):
            left_out |= found
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / LEFT_OUT
        path.unlink(missing_ok=True)
        if left_out:
            lines = [json.dumps({"id": id, "reason": reason}, ensure_ascii=False) for id, reason in left_out.items()]
            with replaced(path) as partial:
                partial.write_text("\n".join([*lines, ""]), encoding="utf-8")
            logger.warning(f"{len(left_out)} samples were left out; {path} lists them")


def _counts(batch: dict[str, Any]) -> Tensor:
    """Tokens with a flow loss and tokens with a text loss: (2,)."""
    targets = batch["roles"][:, batch["input_ids"].shape[1] :] == TARGET
    return torch.stack([targets.sum(), (batch["shift_labels"] != IGNORE).sum()])
