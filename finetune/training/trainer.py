"""The training loop: one step, and what happens between steps."""

import logging
import math
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from pathlib import Path

import torch
from moshi.models.lm import LMModel
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from tqdm import tqdm

from finetune.args import TrainArgs
from finetune.base_model.conditions import prepare_conditions
from finetune.checkpoint.resume_check import ResumePoint, global_batch
from finetune.commands import StopRequest
from finetune.data.batches.contiguous_sampler import lane_rows
from finetune.data.batches.dataset import Batch, ChunkDataset
from finetune.data.pipeline import build_train_batches
from finetune.diagnose.monitor import Diagnostics
from finetune.distributed import all_reduce_sum, any_process, barrier, get_rank, get_world_size, is_main
from finetune.errors import TrainingDivergedError
from finetune.eval import evaluate, without_absent
from finetune.loss import loss_sums, loss_weights, total_loss
from finetune.monitoring.inner_loop_log import InnerLoopLog
from finetune.monitoring.log_lines import eval_line, train_line
from finetune.monitoring.metrics_file import MetricsWriter
from finetune.monitoring.step_timer import StepTimer
from finetune.monitoring.ttt_metrics import GateMonitor, InnerLoopRecorder
from finetune.sharding import full_tensor
from finetune.training.carried_memory import CarriedMemory
from finetune.training.long_context import LongContextEvaluator
from finetune.training.optim import build_optimizer, build_scheduler, current_rates
from finetune.training.parallel import TrainingPass
from finetune.training.plan.flops import Utilisation
from finetune.training.samples import Sampler, save_sample
from finetune.training.speaking_copy import speaking_copy
from finetune.training.spoken_scores import SpokenEvaluator
from finetune.training.train_state import Saver, TrainState
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
    num_tokens: int  # of all processes, all streams
    num_frames: int  # of all processes
    num_starts: int  # rows of this process that start a recording


class Trainer:
    """Trains a prepared model.

    Args:
        args: the configuration.
        model: of `build_parallel_model`.
        train_data, eval_data: chunks; eval_data only when `do_eval`.
        unigram: losses of token frequencies, logged beside the model's.
        run_dir: exists.
        writer: of the metrics.
        saver: of the checkpoints.
        frozen: parameters that do not train and are not those of the base model.
        sampler: None when `sample_freq` is 0.
        spoken: None without `eval.spoken.data`.
        long_context: None without `eval.long_context.data`.
        utilisation: None where the peak of the device is not known.
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
        saver: Saver,
        frozen: Sequence[str],
        sampler: Sampler | None,
        spoken: SpokenEvaluator | None,
        long_context: LongContextEvaluator | None,
        utilisation: Utilisation | None,
    ) -> None:
        self.args = args
        self.model = model
        self.device = next(model.parameters()).device
        self.train_data, self.eval_data = train_data, eval_data
        self.run_dir = run_dir
        self.writer = writer
        self.saver = saver
        self.sampler = sampler
        self.spoken = spoken
        self.long_context = long_context
        self.utilisation = utilisation
        self.groups = {name: group for name, group in get_parameter_groups(model, args).items() if group}
        self.trainable = [parameter for group in self.groups.values() for parameter in group]
        self.lanes = lane_rows(args.batch_size, args.num_microbatches, get_rank(), get_world_size())
        self.training_pass = TrainingPass(model, args)
        memory = None
        if args.carries_memory:
            memory = CarriedMemory(model, self.device, chunk_frames=args.chunk_frames)
        self.state = TrainState(
            model,
            build_optimizer(model, args),
            memory=memory,
            gates=GateMonitor(model),
            frozen=frozen,
        )
        self.scheduler = build_scheduler(self.state.optimizer, args)
        self.inner_loop = InnerLoopRecorder(model)
        self.inner_loop_log = InnerLoopLog(run_dir, args.ttt)
        self.diagnostics = Diagnostics(args, model, self.state.gates)
        self.timer = StepTimer(self.device)
        self.unigram = unigram
        self.rates = current_rates(self.state.optimizer, args)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    def train(self, stop: StopRequest) -> None:
        """Run all steps that are left, or as many as there are until a stop is asked for.

        Args:
            stop: asked for by Ctrl-C, SIGTERM and whatever else it listens to.

        Raises:
            TrainingDivergedError: a loss or gradient is not finite; saved checkpoints stay.
        """
        self.diagnostics.start(self.run_dir, self.step)
        with (
            stop.on(signal.SIGINT, signal.SIGTERM),
            closing(self._train_batches()) as batches,
            self.saver.completing(),
        ):
            quiet = None if is_main() else True
            bar = tqdm(total=self.args.max_steps, initial=self.step, unit="step", disable=quiet)
            while self.step < self.args.max_steps:
                if any_process(stop.requested):
                    self._stop()
                    break
                result = self._train_step(batches)
                self._after_step(result)
                bar.update()
            bar.close()
            self.saver.finish(last=True)

    def resume(self, point: ResumePoint) -> None:
        """Go on where a checkpoint stopped; every process must call it, before `train`.

        Raises:
            CheckpointError: its training state does not fit.
        """
        self.state.restore(point, set(chain.from_iterable(self.lanes)))
        self.scheduler = build_scheduler(self.state.optimizer, self.args, step=point.step)

    def _stop(self) -> None:
        if self.step > 0:
            self._save(last=True)
            self.saver.finish(last=True)
        go_on = f"Go on with train.py --resume {self.run_dir}"
        if not self.saver.active or self.step == 0:
            go_on = "Nothing was saved " + ("(do_ckpt: false)." if self.step else "yet.")
        logger.info("Stopped at step %d of %d as asked. %s", self.step, self.args.max_steps, go_on)

    def _train_step(self, batches: Iterator[Batch]) -> StepResult:
        self.timer.start()
        self.model.train()
        self.state.optimizer.zero_grad(set_to_none=True)
        with self.timer.phase("data"):
            micro_batches = [next(batches) for _ in range(self.args.num_microbatches)]
            all_codes = [batch.codes.to(self.device, non_blocking=True) for batch in micro_batches]
            contexts = [batch.context.to(self.device, non_blocking=True) for batch in micro_batches]
            conditions = [prepare_conditions(self.model, batch.conditions) for batch in micro_batches]
        all_weights = [
            loss_weights(codes, self.model, self.args, context)
            for codes, context in zip(all_codes, contexts, strict=True)
        ]
        totals = all_reduce_sum(reduce(torch.add, [weights.totals() for weights in all_weights]))
        sums = torch.zeros(2, device=self.device)
        self.inner_loop.clear()
        for index, (codes, weights) in enumerate(zip(all_codes, all_weights, strict=True)):
            last = index == len(all_codes) - 1
            record = last and self._records_next_step()
            with self.training_pass.micro_batch(last=last), self._carried(index, micro_batches[index]):
                with self.timer.phase("forward"):
                    with (
                        autocast(self.args, self.device),
                        self.inner_loop.recording(record),
                        self.diagnostics.forward(self.step + 1, last=last),
                    ):
                        output = self.training_pass(codes, conditions[index])
                    parts = loss_sums(output, codes, weights, self.model)
                    loss = total_loss(parts, totals) * self.training_pass.loss_scale
                    sums += torch.stack([parts.text.detach(), parts.audio.detach()])
                    del output, parts  # so that backward frees the logits as it goes
                with self.timer.phase("backward"):
                    loss.backward()
        result = self._result(all_reduce_sum(sums), totals, micro_batches)
        self._check_finite(result, micro_batches)
        with self.timer.phase("optimizer"):
            self._update(result.grad_norms["grad_norm"])
        return result

    def _result(self, sums: Tensor, totals: Tensor, micro_batches: list[Batch]) -> StepResult:
        """What the step found, in the one transfer from the device that a step makes.

        It is needed before the update: a step whose loss or gradient is not finite changes nothing.
        """
        norms = self._grad_norms()
        on_host = torch.cat([sums / totals, totals, torch.stack(list(norms.values()))]).tolist()
        text_loss, audio_loss, *on_host = on_host  # NaN without any target
        weighted = zip((text_loss, audio_loss), on_host[:2], strict=True)
        num_frames = global_batch(self.args) * self.args.chunk_frames
        return StepResult(
            loss=sum(loss for loss, weight in weighted if weight > 0),
            text_loss=text_loss,
            audio_loss=audio_loss,
            grad_norms=dict(zip(norms, on_host[2:], strict=True)),
            num_tokens=num_frames * self.model.num_codebooks,
            num_frames=num_frames,
            num_starts=sum(batch.start_frame.tolist().count(0) for batch in micro_batches),
        )

    def _update(self, grad_norm: float) -> None:
        """Clip and apply the gradients, and make the step count."""
        norm = torch.tensor(grad_norm, dtype=torch.float64)  # as the log has it
        clip_grads_with_norm_(self.trainable, self.args.max_norm, norm)
        self.state.optimizer.step()
        self.diagnostics.after_update(self.step + 1, self.state.optimizer)
        self.rates = current_rates(self.state.optimizer, self.args)  # the rates of this step, not of the next
        self.scheduler.step()
        self.state.advance(global_batch(self.args))

    def _carried(self, micro_batch: int, batch: Batch) -> AbstractContextManager[None]:
        if self.state.memory is None:
            return nullcontext()
        return self.state.memory.carried(self.lanes[micro_batch], batch)

    def _after_step(self, result: StepResult) -> None:
        args, last = self.args, self.step == self.args.max_steps
        if self._is_due(args.log_freq) or last:
            self._log(result)
        self.inner_loop_log.write(self.step, self.inner_loop.trajectories())
        self.diagnostics.write(
            self.writer, self.step, {**self.rates, **result.grad_norms, **self.inner_loop.metrics()}
        )
        self._evaluate(last=last)
        if self.sampler is not None and (self._is_due(args.sample_freq) or last):
            self._sample(self.sampler)
        if self._is_due(args.ckpt_freq) or last:
            self._save(last=last)

    def _is_due(self, frequency: int) -> bool:
        return frequency > 0 and self.step % frequency == 0

    def _records_next_step(self) -> bool:
        step = self.step + 1
        logged = step % self.args.log_freq == 0 or step == self.args.max_steps
        return is_main() and (logged or self.inner_loop_log.is_due(step) or self.diagnostics.is_due(step))

    def _grad_norms(self) -> dict[str, Tensor]:
        """`grad_norm` and one of each group, scalars on the device."""
        norms = {}
        for name, group in self.groups.items():
            norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            norms[f"grad_norm_{name}"] = full_tensor(norm)
        return {"grad_norm": torch.stack(list(norms.values())).norm(), **norms}

    def _check_finite(self, result: StepResult, micro_batches: list[Batch]) -> None:
        if math.isfinite(result.loss) and math.isfinite(result.grad_norms["grad_norm"]):
            return
        # No parameter or memory has changed yet, so the same passes show which layer it was.
        layers: list[int] = []
        for index, batch in enumerate(micro_batches):
            with (
                torch.no_grad(),
                self._carried(index, batch),
                self.inner_loop.recording(),
                autocast(self.args, self.device),
            ):
                conditions = prepare_conditions(self.model, batch.conditions)
                self.model(batch.codes.to(self.device), conditions)
            layers += self.inner_loop.layers_not_finite()
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not full_tensor(p.grad).isfinite().all()
        ]
        where = f"the TTT fast weights of transformer.layers.{layers[0]}" if layers else "the loss"
        if not layers and bad:
            where = f"the gradient of {bad[0]} ({len(bad)} tensors)"
        raise TrainingDivergedError(
            f"step {self.step + 1}: {where} is not finite (loss {result.loss:g}, gradient norm "
            f"{result.grad_norms['grad_norm']:g}); saved checkpoints are intact. Lower ttt.base_lr, "
            "ttt.weight_lr_multiplier or optim.lr."
        )

    def _log(self, result: StepResult) -> None:
        # Both of all processes, since gates may be in shards.
        gates, memory = self.state.gates.metrics(), self._memory_metrics(result)
        if not is_main():
            return
        seconds = self.timer.seconds()
        total = seconds.pop("total")
        values = {
            "loss": result.loss,
            "text_loss": result.text_loss,
            "audio_loss": result.audio_loss,
            **self.rates,
            **result.grad_norms,
            **gates,
            **self.inner_loop.metrics(),
            **memory,
            "step_time_sec": total,
            **{f"{phase}_time_sec": time for phase, time in seconds.items()},
            "tokens_per_sec": result.num_tokens / total,
            **self._utilisation(result.num_frames / total / get_world_size()),
            "peak_memory_gb": _peak_memory_gb(self.device),
        }
        values = without_absent(values, self.model, self.args)
        self.writer.write("train", self.step, values)
        logger.info("%s", train_line(self.step, values))

    def _memory_metrics(self, result: StepResult) -> dict[str, float]:
        """Rows of the step that went on with a memory, and that started at `W0`; of all processes."""
        if self.state.memory is None:
            return {}
        num_starts = int(all_reduce_sum(torch.tensor(result.num_starts)))
        carried = global_batch(self.args) - num_starts
        return {"memory_carried": carried, "memory_resets": num_starts}

    def _utilisation(self, frames_per_sec: float) -> dict[str, float]:
        return {} if self.utilisation is None else self.utilisation.metrics(frames_per_sec)

    def _evaluate(self, *, last: bool) -> None:
        """What is due after this step, as one record."""
        values: dict[str, float] = {}
        if self.eval_data is not None and (self._is_due(self.args.eval_freq) or last):
            values = evaluate(self.model, self.eval_data, self.args, device=self.device)
            self.state.record_evaluation(values["loss"])
            values |= self.unigram
        if self.spoken is not None and self.spoken.is_due(self.step):
            values |= self.spoken.measure(self.model)
        if self.long_context is not None and self.long_context.is_due(self.step):
            values |= self.long_context.measure(self.model)
        if values:
            values = without_absent(values, self.model, self.args)
            self.writer.write("eval", self.step, values)
            logger.info("%s", eval_line(self.step, values))

    def _sample(self, sampler: Sampler) -> None:
        speaker = speaking_copy(self.args, self.model)
        if speaker is not None:
            audio = sampler.sample(speaker)
            path = self.run_dir / "samples" / f"step_{self.step}.wav"
            save_sample(audio, path, sampler.sample_rate)
            self.writer.write_audio("sample", self.step, audio, sampler.sample_rate, path=path)
            logger.info("Audio sample: %s", path)
        barrier()

    def _save(self, *, last: bool) -> None:
        self.saver.save(self.state, last=last, wandb_run_id=self.writer.wandb_run_id)

    def _train_batches(self) -> Generator[Batch, None, None]:
        return build_train_batches(
            self.args,
            self.train_data,
            step=self.state.step,
            num_samples=self.state.num_samples,
            pin_memory=self.device.type == "cuda",
        )


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # which not every system has

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on macOS, kilobytes on Linux
