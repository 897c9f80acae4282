"""What a streaming step touches: fast weights no more often than it must, and nothing that is not due."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_inputs import MINI_BATCH_SIZE as C
from ttt_inputs import assert_close, make_layer

B = 3


class CountUses(TorchDispatchMode):
    """How many operations other than views take each of the tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
        self.uses = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            for argument in args:
                if isinstance(argument, torch.Tensor):
                    self.uses[self.names.get(argument.untyped_storage().data_ptr())] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_reads_the_first_weights_once_the_others_thrice_and_writes_them_at_the_end_of_a_mini_batch():
    layer = make_layer(ttt_mlp_layers=3)
    with layer.streaming(1):
        weights = layer._streaming_state.buffers.start_weights
        for number in range(1, 2 * C + 1):
            counter = CountUses(dict(enumerate(weights)))
            versions = [weight._version for weight in weights]
            with counter:
                layer(torch.randn(1, 1, 16, dtype=torch.float64))
            written = [weight._version - version for weight, version in zip(weights, versions, strict=True)]
            commits = int(number % C == 0)
            assert written == [commits] * 3
            assert [counter.uses[index] for index in range(3)] == [1 + commits, 3 + commits, 3 + commits]


def test_on_the_cpu_fast_weights_lie_output_by_output_apart_from_the_parameters():
    layer = make_layer(ttt_mlp_hidden_dims=[1])  # so that the transposed weights are contiguous as they are
    with layer.streaming(1):
        fast_weights = layer._streaming_state.buffers.start_weights
        for _ in range(C):
            layer(torch.randn(1, 1, 16, dtype=torch.float64))
        for fast, parameter in zip(fast_weights, layer.weights, strict=True):
            assert fast.mT.is_contiguous()
            assert fast.shape[1:] == parameter.shape
            assert fast.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
        layer.reset_streaming()
        assert all(fast.mT.is_contiguous() for fast in fast_weights)
        assert all(torch.equal(fast[0], p) for fast, p in zip(fast_weights, layer.weights, strict=True))


@pytest.mark.parametrize("sizes", [[1], [3], [2, C, 1]], ids=str)
@pytest.mark.parametrize("settings", [{}, {"state_decay": 0.1, "use_rope": True}], ids=str)
def test_leaving_out_what_is_not_due_changes_nothing(sizes, settings):
    layer, reference = make_layer(**settings), make_layer(**settings)
    generator = torch.Generator().manual_seed(1)
    with layer.streaming(B), reference.streaming(B):
        states = [module._streaming_state for module in (layer, reference)]
        states[1].branch_free = True
        for number in range(6 * C):
            size = sizes[number % len(sizes)]
            x = torch.randn(B, size, 16, generator=generator, dtype=torch.float64)
            mask = torch.rand(B, generator=generator) < 0.7
            for module in (layer, reference):
                module.set_exec_mask(mask)
                if number == 7:
                    module._streaming_state.buffers.start_weights[1][1] = torch.nan
            assert_close(layer(x), reference(x), 1e-12)
        for buffers in zip(*(state.buffers for state in states), strict=True):
            for a, b in zip(*buffers, strict=True):
                assert_close(a, b, 1e-12)
        for name in ("offsets", "num_tokens", "num_broken"):
            assert torch.equal(getattr(states[0], name), getattr(states[1], name))
        assert states[0].num_broken.tolist() == [0, 1, 0]


@pytest.mark.parametrize("branch_free", [False, True])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("part", ["start_weights", "start_biases", "pending_inputs", "pending_gradients"])
def test_the_output_tells_of_a_value_that_is_not_finite_anywhere_in_a_row(
    part, index, value, size, branch_free
):
    layer = make_layer()
    x = torch.randn(2, C + size, 16, dtype=torch.float64)
    with layer.streaming(2):
        state = layer._streaming_state
        state.branch_free = branch_free
        buffer = getattr(state.buffers, part)[index]
        for place in range(0, buffer[1].numel(), 7 if part == "start_biases" else 23):
            layer.reset_streaming()
            layer(x[:, :C])
            layer(x[:, C:])
            row = buffer[1]
            if part.startswith("pending"):
                row = row[:, : state.offsets[1]]  # the coming tokens are written over the other slots
            row[torch.unravel_index(torch.tensor(place % row.numel()), row.shape)] = value
            out = layer(x[:, :size])
            assert state.num_broken.tolist() == [0, 1]
            assert out.isfinite().all()
            assert all(tensor.isfinite().all() for tensors in state.buffers for tensor in tensors)


def test_a_token_that_is_not_finite_breaks_its_row_only():
    layer = make_layer()
    x = torch.randn(2, 1, 16, dtype=torch.float64)
    with layer.streaming(2):
        layer(x)
        x[1, 0, 3] = torch.inf
        assert layer(x).isfinite().all()
        state = layer._streaming_state
        assert state.num_broken.tolist() == [0, 1]
        assert state.num_tokens.tolist() == [2, 0]
        assert all(tensor.isfinite().all() for tensors in state.buffers for tensor in tensors)
