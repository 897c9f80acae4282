"""Measures the health of a run while it trains, and says once when something is wrong."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path

from moshi.models.lm import LMModel
from torch.optim import AdamW

from finetune.args import TrainArgs
from finetune.diagnose.judge import Judge
from finetune.diagnose.layer_probe import LayerProbe
from finetune.diagnose.rules import SPLIT, Facts, configuration_findings, configuration_remarks
from finetune.diagnose.update_probe import UpdateProbe
from finetune.distributed import is_main
from finetune.monitoring.metrics_file import MetricsWriter, read_records
from finetune.monitoring.ttt_metrics import GateMonitor

logger = logging.getLogger(__name__)


class Diagnostics:
    """The records of `diagnostics.freq`, and a warning for each finding.

    Nothing that is measured changes the training: losses are the same to the last bit.

    Args:
        args: the configuration.
        model: prepared, in shards or not.
        gates: of the run.
    """

    def __init__(self, args: TrainArgs, model: LMModel, gates: GateMonitor) -> None:
        self._freq = args.diagnostics.freq
        self._configuration = configuration_findings(args)
        self._remarks = configuration_remarks(args)
        self._judge = Judge(Facts.of(args))
        self._layers = LayerProbe(model)
        self._updates = UpdateProbe(model)
        self._gates = gates

    def is_due(self, step: int) -> bool:
        """Whether this step is measured."""
        return self._freq > 0 and step % self._freq == 0

    def start(self, run_dir: Path, step: int) -> None:
        """Say what is wrong with the configuration; know what the records of a resumed run have shown.

        Args:
            run_dir: with the records until now.
            step: optimiser steps done.
        """
        if not is_main() or self._freq == 0:
            return
        for finding in self._configuration:
            logger.warning("%s", finding.line())
        for remark in self._remarks:
            logger.info("%s", remark)
        if step > 0:
            for record in read_records(run_dir, SPLIT):
                self._judge.see(record.step, record.values)

    def forward(self, step: int, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward pass of a micro-batch of a step; of the last one the layers are measured."""
        return self._layers.measuring(last and is_main() and self.is_due(step))

    def after_update(self, step: int, optimizer: AdamW) -> None:
        """Right after the optimiser has made this step; every process must call it."""
        if self.is_due(step):
            self._updates.measure(optimizer)

    def write(self, writer: MetricsWriter, step: int, values: dict[str, float]) -> None:
        """The record of a step that is due, and the warnings; every process must call it.

        Args:
            writer: of the metrics.
            step: optimiser steps done.
            values: rates, gradient norms and what the inner loop's recorder has seen.
        """
        if not self.is_due(step):
            return
        gates = self._gates.metrics()  # of all processes, since gates may be in shards
        if not is_main():
            return
        record = {**values, **gates, **self._updates.values(), **self._layers.values()}
        writer.write(SPLIT, step, record)
        for finding in self._judge.see(step, record):
            logger.warning("%s", finding.line())
