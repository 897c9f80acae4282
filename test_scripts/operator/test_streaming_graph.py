"""A streaming step of the TTT layer is one fixed graph: traced once, replayed whatever the rows do.

What a CUDA graph needs can be proved without a GPU: no branch on a value, no transfer to the host, and
buffers that stay where they are. The CPU leaves out passes that change nothing unless told to be
`branch_free`, so the form that a GPU runs is compared with the one that a CPU runs.
"""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ttt_inputs import MINI_BATCH_SIZE as C
from ttt_inputs import assert_close, make_layer

B = 3


def trace(layer, x):
    return make_fx(layer)(x)


def compile_(layer, x):
    torch.compiler.reset()
    return torch.compile(layer, fullgraph=True, backend="eager", dynamic=False)


@pytest.mark.parametrize(
    "settings", [{}, {"state_decay": 0.1, "use_rope": True, "inner_grad_clip": 1.0}], ids=str
)
@pytest.mark.parametrize("capture", [trace, compile_])
def test_a_step_captured_once_replays_with_rows_out_of_step(capture, settings):
    layer, reference = make_layer(**settings), make_layer(**settings)
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(5 * C, B, 1, 16, generator=generator, dtype=torch.float64)
    with layer.streaming(B), reference.streaming(B), torch.no_grad():
        addresses = _addresses(layer)
        layer._streaming_state.branch_free = True
        replay = capture(layer, steps[0])
        layer.reset_streaming()  # capturing may have run the step
        for number, x in enumerate(steps):
            mask = torch.rand(B, generator=generator) < 0.7
            for module in (layer, reference):
                module.set_exec_mask(mask)
                if number == 6:
                    module.reset_streaming(torch.tensor([False, True, False]))
                if number == 9:
                    module._streaming_state.buffers.start_weights[0][2] = torch.nan
            assert_close(replay(x), reference(x), 1e-12)
        states = [module._streaming_state for module in (layer, reference)]
        assert states[0].offsets.tolist() == states[1].offsets.tolist()
        assert states[0].num_broken.tolist() == states[1].num_broken.tolist() == [0, 0, 1]
        assert len(set(states[0].num_tokens.tolist())) == B, "the rows should be out of step"
        assert min(states[0].num_tokens[:2].tolist()) > 2 * C
        assert _addresses(layer) == addresses


def test_a_capture_that_branches_on_a_value_would_be_refused():
    layer = make_layer()
    with layer.streaming(B), torch.no_grad():
        layer._streaming_state.branch_free = True
        layer.register_forward_hook(lambda module, args, out: out if out.sum() > 0 else -out)
        with pytest.raises(Exception, match=r"data-dependent|Could not guard|Dynamic control flow"):
            compile_(layer, None)(torch.randn(B, 1, 16, dtype=torch.float64))


def test_the_form_of_the_cpu_which_asks_what_is_due_would_be_refused():
    layer, x = make_layer(), torch.randn(B, 1, 16, dtype=torch.float64)
    with layer.streaming(B), torch.no_grad(), pytest.raises(RuntimeError, match="data-dependent"):
        trace(layer, x)


def _addresses(layer):
    state = layer._streaming_state
    tensors = [part for parts in state.buffers for part in parts]
    tensors += [state.offsets, state.num_tokens, state.num_broken, state.exec_mask]
    return [tensor.data_ptr() for tensor in tensors]
