"""The inner loop by hand, forward and backward: the same numbers in a fraction of the time and memory.

The operator falls into two parts. The *key scan* (`scan`, `backward`) is what keys, values and inner rates
do to the fast weights, one mini-batch after the other. *Reading* (`read`) is what the queries make of them:
once the steps are known it is not sequential, so it goes for a whole group of mini-batches at once.

Symbols of one layer, and their names in the code. A name with `d` before it is a gradient of the outer loss.

| symbol | meaning | name |
|---|---|---|
| X, Y | what keys and queries put into a layer; X_0 = K, Y_0 = Q | `inputs`, `y` |
| Z | what the layer makes of the keys, before GELU | `tape.z` |
| Zq | what the queries read at the layer, before GELU | `tape.zq` |
| phi' | derivative of GELU at Z | `slopes` |
| s | eta times the gradient of the inner loss at Z, the step | `steps` |
| u | gradient of the inner loss at the output of GELU, times eta | `u` |
| u phi'' | the part of dZ that comes through phi' | `u_phi2s` |
| A | `tril(Y X^T + 1)` | `attention` |
| x̂, r | LayerNorm of the last Z before weight and bias, 1 / std | `normed`, `rstd` |
| gamma, beta | weight and bias of the inner LayerNorm | `norm.weight`, `norm.bias` |
| T | target, V - K | `keys.target` |
| v | `gamma (gamma x̂ + beta - T)`, gradient at x̂ | `v_ln` |
| r mean(v x̂) | what the gradient at the last Z subtracts along x̂ | `r_mean_v_xhat` |
| g | `r (v - mean(v) - x̂ mean(v x̂))`, gradient of the inner loss at the last Z | `raw` |
| w | gradient of the outer loss at x̂ | `w` |
| Lambda, lambda | gradients of fast weights and biases | `dfast` |

The equations stand at the head of `scan`, `backward` and `read`.
"""

from moshi_ttt.manual.function import run_manual

__all__ = ["run_manual"]
