"""The TTT operator and layer on an NVIDIA GPU: what the CPU and the independent values say."""

import pytest
import torch
from moshi.utils.compile import CUDAGraphed

from benchmarks.common.inputs import Size
from benchmarks.common.inputs import make_inputs as make_layer_inputs
from golden_values import GOLDEN, check_golden_values
from moshi_ttt.ops import ttt_mlp, ttt_mlp_with_states
from ttt_inputs import MINI_BATCH_SIZE as C
from ttt_inputs import assert_close, make_layer

pytestmark = pytest.mark.gpu

BACKENDS = ["autograd", "manual", "compiled"]
B = 3


def _on_gpu(backend):
    """The operator with arguments and results on the CPU, computed on the GPU."""

    def run(*args, **settings):
        moved = [[x.cuda() for x in arg] if isinstance(arg, list) else arg.cuda() for arg in args]
        out, state = ttt_mlp_with_states(*moved, backend=backend, **settings)
        assert out.device.type == "cuda"
        return out.cpu(), [w.cpu() for w in state.weights], [b.cpu() for b in state.biases]

    return run


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_the_golden_ones(path, backend):
    check_golden_values(path, _on_gpu(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_moshi_7b_in_float32_stay_close_to_float64(backend):
    size = Size(1, 32, 128, 16, 250)  # with a mini-batch that is not full
    inputs = make_layer_inputs(size, torch.device("cuda"), requires_grad=True)
    exact = [
        part.double() if isinstance(part, torch.Tensor) else [x.double() for x in part] for part in inputs
    ]
    results = []
    for args, name in ((inputs, backend), (exact, "autograd")):
        out = ttt_mlp(*args, mini_batch_size=16, backend=name)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out, *torch.autograd.grad((out * cotangent).sum(), inputs.tensors())])
    for single, double in zip(*results, strict=True):
        error = (single.double() - double.double()).norm() / double.double().norm()
        assert error < 1e-4, f"relative error {error:.1e}"


def test_a_step_captured_in_a_cuda_graph_replays_with_rows_out_of_step():
    layer, reference = make_layer().cuda(), make_layer()
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(5 * C, B, 1, 16, generator=generator, dtype=torch.float64)
    graphed = CUDAGraphed(layer)
    with layer.streaming(B), reference.streaming(B), torch.no_grad():
        for number, x in enumerate(steps):
            mask = torch.rand(B, generator=generator) < 0.7
            for module, device in ((layer, "cuda"), (reference, "cpu")):
                module.set_exec_mask(mask.to(device))
                if number == 6:
                    module.reset_streaming(torch.tensor([False, True, False], device=device))
                if number == 9:
                    module._streaming_state.buffers.start_weights[0][2] = torch.nan
            assert_close(graphed(x.cuda()).cpu(), reference(x), 1e-9)
        assert graphed._graph is not None
        states = [module._streaming_state for module in (layer, reference)]
        assert states[0].offsets.tolist() == states[1].offsets.tolist()
        assert states[0].num_broken.tolist() == states[1].num_broken.tolist() == [0, 0, 1]
