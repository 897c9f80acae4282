"""The training loop: one step, and what happens between steps."""

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from moshi.models.lm import LMModel
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from finetune.args import TrainArgs
from finetune.checkpointing import Checkpointer
from finetune.data.dataset import Batch, ChunkDataset, build_train_loader
from finetune.distributed import (
    all_reduce_sum,
    any_process,
    barrier,
    broadcast_parameters,
    get_rank,
    get_world_size,
    is_main,
    sum_gradients,
)
from finetune.errors import TrainingDivergedError
from finetune.eval import evaluate
from finetune.interruption import StopRequest
from finetune.loss import loss_sums, loss_weights, total_loss
from finetune.monitoring.console import eval_line, train_line
from finetune.monitoring.inner_loop_log import InnerLoopLog
from finetune.monitoring.metrics import MetricsWriter
from finetune.monitoring.ttt_metrics import GateMonitor, InnerLoopRecorder
from finetune.optim import build_optimizer, build_scheduler, current_rates
from finetune.sampling import Sampler, save_sample
from finetune.ttt_utils import get_parameter_groups
from finetune.wrapped_model import autocast

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """One optimiser step; losses are means over all micro-batches and processes."""

    loss: float
    text_loss: float
    audio_loss: float
    grad_norms: dict[str, float]  # before clipping; `grad_norm` and one per group
    num_tokens: int  # of this process, all streams


class Trainer:
    """Trains a prepared model.

    Args:
        args: the configuration.
        model: of `build_model`, on its device.
        train_data, eval_data: chunks; eval_data only when `do_eval`.
        unigram: losses of token frequencies, logged beside the model's.
        run_dir: exists.
        writer: of the metrics.
        checkpointer: None when `do_ckpt` is false.
        sampler: None when `sample_freq` is 0.
    """

    def __init__(
        self,
        args: TrainArgs,
        model: LMModel,
        *,
        train_data: ChunkDataset,
        eval_data: ChunkDataset | None,
        unigram: dict[str, float],
        run_dir: Path,
        writer: MetricsWriter,
        checkpointer: Checkpointer | None,
        sampler: Sampler | None,
    ) -> None:
        self.args = args
        self.model = model
        self.device = next(model.parameters()).device
        self.train_data, self.eval_data = train_data, eval_data
        self.run_dir = run_dir
        self.writer = writer
        self.checkpointer = checkpointer
        self.sampler = sampler
        self.groups = {name: group for name, group in get_parameter_groups(model, args).items() if group}
        self.trainable = [parameter for group in self.groups.values() for parameter in group]
        broadcast_parameters(self.trainable)
        self.optimizer = build_optimizer(model, args)
        self.scheduler = build_scheduler(self.optimizer, args)
        self.gates = GateMonitor(model)
        self.inner_loop = InnerLoopRecorder(model)
        self.inner_loop_log = InnerLoopLog(run_dir, args.ttt)
        self.unigram = unigram
        self.rates = current_rates(self.optimizer)
        self.step = 0

    def train(self) -> None:
        """Run all steps, or as many as there are until Ctrl-C.

        Raises:
            TrainingDivergedError: a loss or gradient is not finite; saved checkpoints stay.
        """
        batches = iter(self._train_loader())
        with StopRequest() as stop, logging_redirect_tqdm():
            bar = tqdm(total=self.args.max_steps, unit="step", disable=None if is_main() else True)
            while self.step < self.args.max_steps:
                started = time.perf_counter()
                result = self._train_step(batches)
                self._after_step(result, time.perf_counter() - started)
                bar.update()
                if any_process(stop.requested) and self.step < self.args.max_steps:
                    self._save_checkpoint()
                    self._log_stop()
                    break
            bar.close()

    def _log_stop(self) -> None:
        saved = f"Go on from these weights with --init_from {self.run_dir}"
        if self.checkpointer is None:
            saved = "Nothing was saved (do_ckpt: false)."
        logger.info("Stopped at step %d of %d as asked. %s", self.step, self.args.max_steps, saved)

    def _train_step(self, batches: Iterator[Batch]) -> StepResult:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        all_codes = [
            next(batches).codes.to(self.device, non_blocking=True) for _ in range(self.args.num_microbatches)
        ]
        all_weights = [loss_weights(codes, self.model, self.args) for codes in all_codes]
        totals = all_reduce_sum(sum(weights.totals() for weights in all_weights))
        sums = torch.zeros(2, device=self.device)
        self.inner_loop.clear()
        for index, (codes, weights) in enumerate(zip(all_codes, all_weights, strict=True)):
            record = index == self.args.num_microbatches - 1 and self._records_next_step()
            with autocast(self.args, self.device), self.inner_loop.recording(record):
                output = self.model(codes)
            parts = loss_sums(output, codes, weights, self.model)
            total_loss(parts, totals).backward()
            sums += torch.stack([parts.text.detach(), parts.audio.detach()])
        sum_gradients(self.trainable)
        text_loss, audio_loss = (all_reduce_sum(sums) / totals).tolist()  # NaN without any target
        grad_norms = self._grad_norms()
        result = StepResult(
            loss=sum(
                loss for loss, weight in zip((text_loss, audio_loss), totals, strict=True) if weight > 0
            ),
            text_loss=text_loss,
            audio_loss=audio_loss,
            grad_norms=grad_norms,
            num_tokens=sum(codes.numel() for codes in all_codes),
        )
        self._check_finite(result, all_codes)
        torch.nn.utils.clip_grad_norm_(self.trainable, self.args.max_norm)
        self.optimizer.step()
        self.rates = current_rates(self.optimizer)  # the rates of this step, not of the next
        self.scheduler.step()
        self.step += 1
        return result

    def _after_step(self, result: StepResult, seconds: float) -> None:
        args, last = self.args, self.step == self.args.max_steps
        if self._is_due(args.log_freq) or last:
            self._log(result, seconds)
        self.inner_loop_log.write(self.step, self.inner_loop.trajectories())
        if args.do_eval and (self._is_due(args.eval_freq) or last):
            self._evaluate()
        if self.sampler is not None and (self._is_due(args.sample_freq) or last):
            self._sample()
        if self._is_due(args.ckpt_freq) or last:
            self._save_checkpoint()

    def _is_due(self, frequency: int) -> bool:
        return frequency > 0 and self.step % frequency == 0

    def _records_next_step(self) -> bool:
        step = self.step + 1
        logged = step % self.args.log_freq == 0 or step == self.args.max_steps
        return is_main() and (logged or self.inner_loop_log.is_due(step))

    def _grad_norms(self) -> dict[str, float]:
        norms = {
            f"grad_norm_{name}": torch.stack([p.grad.norm() for p in group if p.grad is not None]).norm()
            for name, group in self.groups.items()
        }
        values = torch.stack(list(norms.values()))
        total, *parts = torch.cat([values.norm()[None], values]).tolist()
        return {"grad_norm": total, **dict(zip(norms, parts, strict=True))}

    def _check_finite(self, result: StepResult, all_codes: list[Tensor]) -> None:
        if math.isfinite(result.loss) and math.isfinite(result.grad_norms["grad_norm"]):
            return
        # No parameter has changed yet, so the same passes show which layer it was.
        layers: list[int] = []
        for codes in all_codes:
            with torch.no_grad(), autocast(self.args, self.device), self.inner_loop.recording():
                self.model(codes)
            layers += self.inner_loop.layers_not_finite()
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        where = f"the TTT fast weights of transformer.layers.{layers[0]}" if layers else "the loss"
        if not layers and bad:
            where = f"the gradient of {bad[0]} ({len(bad)} tensors)"
        raise TrainingDivergedError(
            f"step {self.step + 1}: {where} is not finite (loss {result.loss:g}, gradient norm "
            f"{result.grad_norms['grad_norm']:g}); saved checkpoints are intact. Lower ttt.base_lr, "
            "ttt.weight_lr_multiplier or optim.lr."
        )

    def _log(self, result: StepResult, seconds: float) -> None:
        if not is_main():
            return
        values = {
            "loss": result.loss,
            "text_loss": result.text_loss,
            "audio_loss": result.audio_loss,
            **self.rates,
            **result.grad_norms,
            **self.gates.metrics(),
            **self.inner_loop.metrics(),
            "step_time_sec": seconds,
            "tokens_per_sec": result.num_tokens * get_world_size() / seconds,
            "peak_memory_gb": _peak_memory_gb(self.device),
        }
        self.writer.write("train", self.step, values)
        logger.info("%s", train_line(self.step, values))

    def _evaluate(self) -> None:
        assert self.eval_data is not None
        values = evaluate(self.model, self.eval_data, self.args, device=self.device)
        values |= self.unigram
        self.writer.write("eval", self.step, values)
        logger.info("%s", eval_line(self.step, values))

    def _sample(self) -> None:
        if is_main():
            assert self.sampler is not None
            audio = self.sampler.sample(self.model)
            path = self.run_dir / "samples" / f"step_{self.step}.wav"
            save_sample(audio, path, self.sampler.sample_rate)
            self.writer.write_audio("sample", self.step, audio, self.sampler.sample_rate)
            logger.info("Audio sample: %s", path)
        barrier()

    def _save_checkpoint(self) -> None:
        if self.checkpointer is not None and is_main():
            self.checkpointer.save(self.model, self.step)
        barrier()

    def _train_loader(self):
        return build_train_loader(
            self.train_data,
            batch_size=self.args.batch_size,
            rank=get_rank(),
            world_size=get_world_size(),
            seed=self.args.seed,
            shuffle=self.args.data.shuffle,
            num_workers=self.args.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on macOS, kilobytes on Linux
