"""The inner loop with a backward pass by hand: the same numbers in a fraction of the time and memory.

Symbols of one mini-batch and layer, and their names in the code. A name with `d` before it is a gradient of
the outer loss, one with `n_` a list by layer and mini-batch, one with `all_` the buffer of a whole group.

| symbol | meaning | name |
|---|---|---|
| X, Y | what keys and queries put into a layer; X_1 = K, Y_1 = Q | `x`, `xq` |
| Z | what the layer makes of the keys, before GELU | `z` |
| Zq | what the queries read at the layer, before GELU | `zq`, `outputs` |
| phi' | derivative of GELU at Z | `slope` |
| u | gradient of the inner loss at the output of GELU | `tape.u` |
| u phi'' | the part of dZ that comes through phi' | `u_phi2` |
| ĝ | eta times the gradient of the inner loss at Z, the step | `steps` |
| Â | `tril(Y X^T + 1)` | `attention` |
| x̂, r | LayerNorm of the last Z before weight and bias, 1 / std | `normed`, `rstd` |
| gamma, beta | weight and bias of the inner LayerNorm | `norm.weight`, `norm.bias` |
| T | target, V - K | `v - k` |
| v | `gamma (gamma x̂ + beta - T)`, gradient at x̂; the name `v` is the token's value | `v_ln` |
| r mean(v x̂) | what the gradient at the last Z subtracts along x̂ | `r_mean_v_xhat` |
| g | `r (v - mean(v) - x̂ mean(v x̂))`, gradient of the inner loss at the last Z | `raw` |
| w | gradient of the outer loss at x̂ | `w` |
| Lambda, lambda | gradients of fast weights and biases after the mini-batch | `dfast` |

The equations stand at the head of `moshi_ttt.manual.backward`.
"""

from moshi_ttt.manual.function import run_manual

__all__ = ["run_manual"]
