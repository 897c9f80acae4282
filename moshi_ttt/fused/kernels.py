"""The key scan of the two-layer TTT-MLP as two Triton kernels, forward and back.

One program owns one row (batch row and head) and one slice of the hidden layer. Its slices of both fast
weights, or of their gradients, stay in registers from the first mini-batch to the last. The programs of a row
add up one tile `[C, D]` per mini-batch through global memory; they wait for each other, so they draw their
places in the order in which the device starts them.

Symbols are those of `moshi_ttt.manual`, where the equations of the way back stand too; here the fast weights
move with every mini-batch, so there is no sum over the mini-batches before.
A barrier stands wherever threads of one program read what others of it have written: Triton orders neither.

Shapes: R rows, N mini-batches, C tokens of one, T = N * C tokens of which the last ones may be padding, D
head_dim, F hidden width, S slices, FS = F / S, G mini-batches per group, NG = N / G groups, H heads.
"""

import triton
import triton.language as tl


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """`a b`; bf16: operands rounded, the sum in float32."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _add_product(total, a, b, PRECISION: tl.constexpr):
    """`total + a b`, in the registers of total."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _gelu_parts(z):
    """tanh(w(z)) and w'(z) of GELU in its tanh form; exp may overflow, the limits are right."""
    w = 0.7978845608028654 * (z + 0.044715 * z * z * z)
    tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * w))
    return tanh, 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)


@triton.jit
def _normalise(z, eps, D: tl.constexpr):
    """LayerNorm without weight and bias, and 1 / std."""
    centred = z - tl.sum(z, 1)[:, None] / D
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / D + eps)
    return centred * rstd, rstd


@triton.jit
def _project(a, normed, D: tl.constexpr):
    """`a - mean(a) - normed mean(a normed)`: the way back through normalising, without 1 / std."""
    return a - tl.sum(a, 1)[:, None] / D - normed * (tl.sum(a * normed, 1)[:, None] / D)


@triton.jit
def _place(ticket, S: tl.constexpr):
    """Row and slice of this program."""
    if S == 1:
        place = tl.program_id(0)
    else:
        place = tl.atomic_add(ticket, 1)
    return (place // S).to(tl.int64), place % S


@triton.jit
def _sum_over_slices(part, parts, arrived, row, s, turn, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr):
    """The sum of `part`, `[C, D]`, over the programs of a row, in the same order in each of them.

    Two buffers by turns are enough: who writes turn n + 2 has seen all arrive at n + 1, so all have read n.
    """
    if S == 1:
        return part
    else:
        tile = tl.arange(0, C)[:, None] * D + tl.arange(0, D)[None, :]
        base = parts + (row * 2 + turn % 2) * S * C * D
        tl.store(base + s * C * D + tile, part, cache_modifier=".cg")
        tl.debug_barrier()
        tl.atomic_add(arrived + row, 1, sem="release", scope="gpu")
        while tl.atomic_add(arrived + row, 0, sem="acquire", scope="gpu") < S * (turn + 1):
            pass
        tl.debug_barrier()
        total = tl.zeros([C, D], tl.float32)
        for i in tl.static_range(S):
            total += tl.load(base + i * C * D + tile, cache_modifier=".cg")
        return total


@triton.jit
def scan_forward(
    k, v, eta,  # [R, T, D], [R, T, D], [R, T]
    ln_weight, ln_bias,  # [H, D]
    w0, b0, w1, b1,  # fast weights at the first token: [R, D, F], [R, F], [R, F, D], [R, D]
    z0, u, z1,  # out: [R, T, F], [R, T, F], [R, T, D]
    w0_groups, b0_groups, w1_groups, b1_groups,  # out: at the start of each group, [R, NG, ...]
    w0_last, b0_last, w1_last, b1_last,  # out: after the last full mini-batch
    parts, arrived, ticket,  # [R, 2, S, C, D], [R] zeros, [1] zero
    num_tokens, N, H, NG, eps,
    D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward. A last mini-batch that `num_tokens` do not fill leaves the fast weights as they are."""
    FS: tl.constexpr = F // S
    row, s = _place(ticket, S)
    head = row % H
    c = tl.arange(0, C)
    d = tl.arange(0, D)
    f = s * FS + tl.arange(0, FS)
    at_w0 = d[:, None] * F + f[None, :]
    at_w1 = f[:, None] * D + d[None, :]
    at_d = c[:, None] * D + d[None, :]
    at_f = c[:, None] * F + f[None, :]
    own_w0 = tl.load(w0 + row * D * F + at_w0)
    own_w1 = tl.load(w1 + row * F * D + at_w1)
    own_b0 = tl.load(b0 + row * F + f)
    own_b1 = tl.load(b1 + row * D + d)
    gamma = tl.load(ln_weight + head * D + d)[None, :]
    beta = tl.load(ln_bias + head * D + d)[None, :]
    for n in range(N):
        if n % G == 0:
            group = row * NG + n // G
            tl.store(w0_groups + group * D * F + at_w0, own_w0)
            tl.store(w1_groups + group * F * D + at_w1, own_w1)
            tl.store(b0_groups + group * F + f, own_b0)
            if s == 0:
                tl.store(b1_groups + group * D + d, own_b1)
        first = (row * N + n) * C
        keys = tl.load(k + first * D + at_d)
        values = tl.load(v + first * D + at_d)
        rate = tl.load(eta + first + c)[:, None]

        own_z0 = _product(keys, own_w0, PRECISION) + own_b0[None, :]
        tanh, inner_slope = _gelu_parts(own_z0)
        x1 = 0.5 * own_z0 * (1.0 + tanh)
        part = _product(x1, own_w1, PRECISION)
        own_z1 = _sum_over_slices(part, parts, arrived, row, s, n, C, D, S) + own_b1[None, :]
        normed, rstd = _normalise(own_z1, eps, D)
        s1 = rstd * _project(gamma * (gamma * normed + beta - (values - keys)), normed, D) * rate
        own_u = _product(s1, tl.trans(own_w1), PRECISION)
        slope = 0.5 * (1.0 + tanh) + 0.5 * own_z0 * (1.0 - tanh * tanh) * inner_slope
        tl.store(z0 + first * F + at_f, own_z0)
        tl.store(u + first * F + at_f, own_u)
        if s == 0:
            tl.store(z1 + first * D + at_d, own_z1)

        full = (n * C + C <= num_tokens).to(tl.float32)
        s0 = own_u * slope * -full
        s1 = s1 * -full
        own_w0 = _add_product(own_w0, tl.trans(keys), s0, PRECISION)
        own_w1 = _add_product(own_w1, tl.trans(x1), s1, PRECISION)
        own_b0 += tl.sum(s0, 0)
        own_b1 += tl.sum(s1, 0)
    tl.store(w0_last + row * D * F + at_w0, own_w0)
    tl.store(w1_last + row * F * D + at_w1, own_w1)
    tl.store(b0_last + row * F + f, own_b0)
    if s == 0:
        tl.store(b1_last + row * D + d, own_b1)


@triton.jit
def scan_backward(
    k, v, eta, ln_weight, ln_bias,
    x1, slope, u_phi2, z1,  # GELU(Z_0), GELU'(Z_0), u GELU''(Z_0): [R, T, F]; [R, T, D]
    w1_groups, w1_now,  # [R, NG, F, D]; scratch [R, F, D], at first the fast weights after all
    ds0, dx1, ds1,  # from the queries and the pending tokens: [R, T, F], [R, T, F], [R, T, D]
    dw0_groups, db0_groups, dw1_groups, db1_groups,  # from the queries, for the start of each group
    dw0, db0, dw1, db1,  # in: of the last fast weights; out: of the first
    dw0_after_groups,  # out: of the fast weights after each group but the last, [R, NG, D, F]
    dz0, dtarget, deta,  # out: [R, T, F], [R, T, D], [R, T]
    dln_weight, dln_bias,  # out: [R, D]
    parts, arrived, ticket,
    num_tokens, N, H, NG, eps,
    D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward; the gradient of the keys follows from what is written, see `moshi_ttt.fused.function`."""
    FS: tl.constexpr = F // S
    row, s = _place(ticket, S)
    head = row % H
    c = tl.arange(0, C)
    d = tl.arange(0, D)
    f = s * FS + tl.arange(0, FS)
    at_w0 = d[:, None] * F + f[None, :]
    at_w1 = f[:, None] * D + d[None, :]
    at_d = c[:, None] * D + d[None, :]
    at_f = c[:, None] * F + f[None, :]
    lambda0 = tl.load(dw0 + row * D * F + at_w0)
    lambda1 = tl.load(dw1 + row * F * D + at_w1)
    lambda_b0 = tl.load(db0 + row * F + f)
    lambda_b1 = tl.load(db1 + row * D + d)
    gamma = tl.load(ln_weight + head * D + d)[None, :]
    beta = tl.load(ln_bias + head * D + d)[None, :]
    sum_gamma = tl.zeros([D], tl.float32)
    sum_beta = tl.zeros([D], tl.float32)
    for turn in range(N):
        n = N - 1 - turn
        full = (n * C + C <= num_tokens).to(tl.float32)
        first = (row * N + n) * C
        keys = tl.load(k + first * D + at_d)
        target = tl.load(v + first * D + at_d) - keys
        rate = tl.load(eta + first + c)[:, None]
        own_x1 = tl.load(x1 + first * F + at_f)
        own_slope = tl.load(slope + first * F + at_f)
        normed, rstd = _normalise(tl.load(z1 + first * D + at_d), eps, D)
        v_ln = gamma * (gamma * normed + beta - target)
        raw = rstd * _project(v_ln, normed, D)
        s1 = raw * rate

        # W_1 at the start of this mini-batch: its own step taken back, or the copy where a group starts.
        own_w1 = tl.load(w1_now + row * F * D + at_w1)
        own_w1 = _add_product(own_w1, tl.trans(own_x1), s1 * full, PRECISION)
        if n % G == 0:
            own_w1 = tl.load(w1_groups + (row * NG + n // G) * F * D + at_w1)
        tl.debug_barrier()
        tl.store(w1_now + row * F * D + at_w1, own_w1)
        tl.debug_barrier()

        own_ds0 = tl.load(ds0 + first * F + at_f)
        own_ds0 -= full * (_product(keys, lambda0, PRECISION) + lambda_b0[None, :])
        du = own_ds0 * own_slope
        part = _product(du, own_w1, PRECISION) - full * _product(own_x1, lambda1, PRECISION)
        own_ds1 = _sum_over_slices(part, parts, arrived, row, s, turn, C, D, S)
        own_ds1 += tl.load(ds1 + first * D + at_d) - full * lambda_b1[None, :]

        # Through the gradient of the inner loss.
        push = own_ds1 * rate
        dv_ln = rstd * _project(push, normed, D)
        mean_v = tl.sum(v_ln * normed, 1)[:, None] / D
        mean_push = tl.sum(push * normed, 1)[:, None] / D
        w = gamma * gamma * dv_ln - rstd * (push * mean_v + v_ln * mean_push)
        dz1 = rstd * _project(w, normed, D) - rstd * normed * (tl.sum(push * raw, 1)[:, None] / D)
        if s == 0:
            tl.store(deta + first + c, tl.sum(raw * own_ds1, 1))
            tl.store(dtarget + first * D + at_d, -gamma * dv_ln)
            sum_gamma += tl.sum(dv_ln * (2.0 * gamma * normed + beta - target), 0)
            sum_beta += tl.sum(gamma * dv_ln, 0)

        own_dx1 = tl.load(dx1 + first * F + at_f)
        own_dx1 += _product(dz1, tl.trans(own_w1), PRECISION) - full * _product(
            s1, tl.trans(lambda1), PRECISION
        )
        own_dz0 = own_dx1 * own_slope + own_ds0 * tl.load(u_phi2 + first * F + at_f)
        tl.store(dz0 + first * F + at_f, own_dz0)

        lambda0 = _add_product(lambda0, tl.trans(keys), own_dz0, PRECISION)
        lambda1 = _add_product(lambda1, tl.trans(own_x1), dz1, PRECISION)
        lambda1 = _add_product(lambda1, tl.trans(du), s1, PRECISION)
        lambda_b0 += tl.sum(own_dz0, 0)
        lambda_b1 += tl.sum(dz1, 0)
        if n % G == 0:
            group = row * NG + n // G
            lambda0 += tl.load(dw0_groups + group * D * F + at_w0)
            lambda1 += tl.load(dw1_groups + group * F * D + at_w1)
            lambda_b0 += tl.load(db0_groups + group * F + f)
            lambda_b1 += tl.load(db1_groups + group * D + d)
            if n > 0:
                tl.store(dw0_after_groups + (group - 1) * D * F + at_w0, lambda0)
    tl.store(dw0 + row * D * F + at_w0, lambda0)
    tl.store(dw1 + row * F * D + at_w1, lambda1)
    tl.store(db0 + row * F + f, lambda_b0)
    if s == 0:
        tl.store(db1 + row * D + d, lambda_b1)
        tl.store(dln_weight + row * D + d, sum_gamma)
        tl.store(dln_bias + row * D + d, sum_beta)
