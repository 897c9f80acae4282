"""Triton's interpreter with programs that run at the same time, and with operands that are rounded."""

import inspect
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter

_SECONDS = 60


@contextmanager
def programs_at_the_same_time(seed: int) -> Iterator[None]:
    """Each program of a launch in a thread of its own, started in random order; a deadlock is an error."""
    builder = type(interpreter.interpreter_builder)
    own, call = threading.local(), interpreter.GridExecutor.__call__
    place = interpreter.interpreter_builder.__dict__.pop("grid_idx", None)

    def run(self, *arguments, **options):
        names = inspect.getfullargspec(self.fn).args
        options = {name: value for name, value in options.items() if name in names}
        hosts, named = self._init_args_hst(arguments, options)
        scope = interpreter._patch_lang(self.fn)
        errors: list[BaseException] = []
        try:
            given = inspect.getcallargs(self.fn, *hosts, **named)
            given = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in given.items()
            }
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)

            def program(index: int) -> None:
                try:
                    interpreter.interpreter_builder.set_grid_idx(index, 0, 0)
                    self.fn(**given)
                except BaseException as error:
                    errors.append(error)

            order = random.Random(seed).sample(range(grid[0]), grid[0])
            threads = [threading.Thread(target=program, args=(index,), daemon=True) for index in order]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(_SECONDS)
            if errors:
                raise errors[0]
            assert not any(thread.is_alive() for thread in threads), (
                "the programs wait for each other for ever"
            )
        finally:
            if scope is not None:  # since Triton 3.6
                scope.restore()
        self._restore_args_dev(arguments, hosts, options, named)

    builder.grid_idx = property(lambda self: own.place, lambda self, value: setattr(own, "place", value))
    interpreter.GridExecutor.__call__ = run
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # who waits, waits short
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        interpreter.GridExecutor.__call__ = call
        del builder.grid_idx
        interpreter.interpreter_builder.grid_idx = place


@contextmanager
def operands_rounded_to(precision: str) -> Iterator[None]:
    """Products in the kernels with operands in `tf32` or `bf16`; the interpreter by itself does not round."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def rounded(self, a, b, *rest):
        a, b = (interpreter.TensorHandle(_round(x.data, precision), x.dtype) for x in (a, b))
        return create_dot(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = rounded
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = create_dot


def _round(x: np.ndarray, precision: str) -> np.ndarray:
    single = np.ascontiguousarray(x, dtype=np.float32)
    if precision == "bf16":
        return torch.from_numpy(single).bfloat16().float().numpy()
    bits = single.view(np.uint32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)  # to nearest, 10 bits of mantissa
    return bits.view(np.float32)
