"""Test-Time-Training layers for Moshi: a memory that learns while it listens.

`TTTConfig` describes a layer, `moshi_ttt.ops` computes its inner loop, and
`HybridStreamingTransformerLayer` is a Moshi transformer layer that has one.
"""

from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.memory import load_ttt_states, save_ttt_states
from moshi_ttt.session import load_session, save_session
from moshi_ttt.ssm_gating import SSMGating

__version__ = "0.2.0"

__all__ = [
    "HybridStreamingTransformerLayer",
    "SSMGating",
    "TTTConfig",
    "load_session",
    "load_ttt_states",
    "save_session",
    "save_ttt_states",
]
