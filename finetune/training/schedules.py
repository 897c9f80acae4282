"""Schedules of the outer learning rates as shares of their peak: cosine, and warm-up, stable, decay.

Of a run of N steps, W of them warm-up, D of them decay; steps are counted from 0. The peak is in step W - 1,
or in step 0 without a warm-up, as that of OneCycle; no step has a rate of 0.
"""

import math
from collections.abc import Callable

from finetune.args import TrainArgs


def share_of_peak(args: TrainArgs) -> Callable[[int], float]:
    """The rate of a step as a share of its peak, for the schedules `cosine` and `wsd`.

    Both warm up in a straight line. Then `cosine` falls along half a cosine over all of the other steps
    (Loshchilov and Hutter 2017, without restarts), and `wsd` stays at the peak until the last D steps, in
    which it falls in a straight line (Hu et al. 2024, MiniCPM; the line is that of Hägele et al. 2024).
    """
    num_steps = args.max_steps
    warm_up = max(1.0, args.optim.num_warmup_steps(num_steps))
    decay = args.optim.num_decay_steps(num_steps)

    def share(step: int) -> float:
        if step + 1 < warm_up:
            return (step + 1) / warm_up
        if args.optim.schedule == "cosine":
            past = (step + 1 - warm_up) / (num_steps + 1 - warm_up)
            return 0.5 + 0.5 * math.cos(math.pi * past)
        return min(1.0, (num_steps - step) / decay)

    return share
