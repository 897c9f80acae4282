"""Keys of older and foreign configurations, and what replaces them here."""

from fnmatch import fnmatch

_REPLACEMENTS = {
    "*ttt_fig5_enable": "ttt.log_inner_loop_losses",
    "*ttt_fig5_*": "the keys ttt.log_inner_loop_losses, ttt.inner_loop_log_interval and "
    "ttt.inner_loop_plot_dir",
    "*librilight_evaluation_mode*": "the command `evaluate.py long-context`",
    "*librilight_*": "the command `evaluate.py long-context`",
    "*paper_metrics_*": "the command `evaluate.py`",
    "training.lr": "optim.lr",
    "training.batch_size": "batch_size",
    "training.max_steps": "max_steps",
    "training.*": "the same key at the top level or under optim:",
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "pct_start": "optim.pct_start",
    "ttt.ttt_base_lr": "ttt.base_lr",
    "ttt.gating_alpha_init": "ttt.initial_gating_alpha",
    "ttt.mini_batch": "ttt.mini_batch_size",
    "ttt.ttt_layers": "ttt.layers",
    "ttt_*": "the section ttt:",
    "world_size": "torchrun --nproc-per-node",
}


def replacement_for(key: str) -> str | None:
    """What to write instead of `key` (dotted), or None when nothing is known about it."""
    for pattern, replacement in _REPLACEMENTS.items():
        if fnmatch(key, pattern):
            return replacement
    return None
