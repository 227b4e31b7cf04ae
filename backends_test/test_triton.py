"""The LSTM in Triton: on a GPU as it is, elsewhere by Triton's interpreter."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import keras
import numpy as np
import oracles
import pytest

from multilstm import ops
from multilstm.doctor import is_fast
from multilstm.errors import UserError

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="of PyTorch's implementation"
)

# Sums of a few dozen products of size 1.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# Of float16 the 11 bits, over a few steps.
FLOAT16 = {"rtol": 1e-2, "atol": 1e-2}


@pytest.fixture
def triton_torch():
    pytest.importorskip("triton", reason="Triton is for Linux")
    return importlib.import_module("multilstm.ops.triton_torch")


def arrays_of(rng, batch, time, features, units):
    shapes = (
        *((batch, time, features), (batch, units), (batch, units)),
        *((features, 4 * units), (units, 4 * units), (4 * units,)),
    )
    scales = (1, 1, 1, features**-0.5, units**-0.5, 1)
    return [
        scale * rng.standard_normal(shape)
        for scale, shape in zip(scales, shapes, strict=True)
    ]


def upstream_of(rng, batch, time, units):
    shapes = ((batch, time, units), (batch, units), (batch, units))
    return [rng.standard_normal(shape) for shape in shapes]


def run(lstm, arrays, upstream, dtype, **options):
    """Outputs and gradients of `lstm` in NumPy's float64."""
    import torch

    device = "cuda" if ops.has_gpu() else "cpu"
    of_dtype = {"device": device, "dtype": getattr(torch, dtype)}
    tensors = [
        torch.tensor(array, **of_dtype, requires_grad=True) for array in arrays
    ]
    outputs = lstm(*tensors, **options)
    gradients = torch.autograd.grad(
        outputs, tensors, [torch.from_numpy(u).to(**of_dtype) for u in upstream]
    )
    return [t.detach().double().cpu() for t in (*outputs, *gradients)]


def check(lstm, arrays, upstream, dtype, tolerance):
    """Outputs and gradients are the oracle's."""
    expected = (
        *oracles.lstm(*arrays),
        *oracles.lstm_gradients(arrays, upstream),
    )
    found = run(lstm, arrays, upstream, dtype)
    for mine, true in zip(found, expected, strict=True):
        # A weight's gradient is a sum over all rows and steps.
        size = max(1.0, np.abs(true).max())
        np.testing.assert_allclose(mine / size, true / size, **tolerance)


@pytest.mark.parametrize(
    ("batch", "time", "features", "units"),
    [
        (3, 4, 5, 16),  # fewer units than are multiplied at once
        (20, 3, 7, 70),  # a part of the units left over
        (2, 1, 3, 64),  # none, and no step before or after
        (131, 2, 4, 64),  # more rows than one program takes
    ],
)
def test_outputs_and_gradients_are_the_oracles(
    triton_torch, rng, batch, time, features, units
):
    check(
        triton_torch.lstm,
        arrays_of(rng, batch, time, features, units),
        upstream_of(rng, batch, time, units),
        "float32",
        FLOAT32,
    )


def test_half_the_bits_keep_a_cell_state_of_float32(triton_torch, rng):
    arrays = arrays_of(rng, 3, 4, 5, 16)
    upstream = upstream_of(rng, 3, 4, 16)
    check(triton_torch.lstm, arrays, upstream, "float16", FLOAT16)

    # 2,048 and a half is no number of float16: an open forget gate, and an
    # input gate of which each step adds a half.
    import torch

    device = "cuda" if ops.has_gpu() else "cpu"
    half = {"device": device, "dtype": torch.float16}
    steps, units = 8, 16
    bias = torch.zeros(4, units, **half)
    bias[1], bias[2] = 60.0, 60.0
    zeros = torch.zeros(units, 4 * units, **half)
    _, _, c = triton_torch.lstm(
        torch.zeros(1, steps, units, **half),
        torch.zeros(1, units, device=device),
        torch.full((1, units), 2048.0, device=device),
        *(zeros, zeros, bias.flatten()),
    )
    assert (c == 2048 + steps / 2).all()


def test_gradients_of_the_states_may_come_column_by_column(triton_torch, rng):
    """64 units are not padded, so that they come as they were."""
    batch, units = 3, 64
    arrays = arrays_of(rng, batch, 2, 5, units)
    upstream = upstream_of(rng, batch, 2, units)
    [x, h, c] = (np.asfortranarray(array) for array in upstream)
    found, other = (
        run(triton_torch.lstm, arrays, given, "float32")
        for given in (upstream, [x, h, c])
    )
    for mine, same in zip(found, other, strict=True):
        np.testing.assert_array_equal(mine, same)


def test_second_derivatives_are_refused(triton_torch, rng):
    """And the first, which would be differentiated, is as without."""
    import torch

    device = "cuda" if ops.has_gpu() else "cpu"
    arrays = arrays_of(rng, 3, 2, 5, 16)
    for place in range(len(arrays)):  # whichever alone is trained
        tensors = [
            torch.tensor(array, device=device, dtype=torch.float32)
            for array in arrays
        ]
        wanted = tensors[place].requires_grad_()
        y, _, c = triton_torch.lstm(*tensors)
        total = y.sum() + c.sum()
        [plain] = torch.autograd.grad(total, wanted, retain_graph=True)
        [gradient] = torch.autograd.grad(total, wanted, create_graph=True)
        assert torch.equal(gradient, plain)
        with pytest.raises(UserError, match="no second derivatives"):
            # The penalty is not all that these weights are trained for.
            torch.autograd.grad(total + gradient.square().sum(), wanted)


@pytest.mark.parametrize(
    "blocks",
    [
        *({"units": 8}, {"units": 32}, {"inner": 32, "columns": 32}),
        *({"most_rows": 16}, {"columns": 16}, {"programs": 2}),
        *({"in_parts": True}, {"in_parts": True, "programs": 2}),
    ],
)
def test_how_products_are_cut_changes_nothing(triton_torch, rng, blocks):
    arrays = arrays_of(rng, 20, 3, 5, 70)
    upstream = upstream_of(rng, 20, 3, 70)
    found = [
        run(triton_torch.lstm, arrays, upstream, "float32", **options)
        for options in ({}, {"blocks": triton_torch.Blocks(**blocks)})
    ]
    for mine, other in zip(*found, strict=True):
        np.testing.assert_allclose(mine, other, **FLOAT32)


def test_it_reads_what_trains_and_leaves_the_rest(triton_torch):
    import torch

    device = "cuda" if ops.has_gpu() else "cpu"
    x = torch.zeros(2, 3, 4, device=device)
    assert triton_torch.is_for(x)
    assert not triton_torch.is_for(x.double())
    assert not triton_torch.is_for(x[:0])
    with torch.no_grad():
        assert not triton_torch.is_for(x)


@pytest.mark.parametrize("setting", ["recorded", "0", "1"])
def test_which_steps_it_is_for(monkeypatch, setting):
    from multilstm.ops import torch as implementation

    stand_in = SimpleNamespace(
        is_for=lambda x: x.trains, is_faster=lambda x: x.is_faster
    )
    for name in ("_triton_torch", "_triton_torch_or_why_not"):
        monkeypatch.setattr(implementation, name, lambda: stand_in)
    monkeypatch.setattr(implementation, "_TRITON", setting)

    def taken(**differing):
        x = {"is_cuda": True, "trains": True, "is_faster": True} | differing
        return implementation._is_for_triton(SimpleNamespace(**x))

    def taken_in_recorded_steps(**differing):
        token = implementation.is_recorded.set(True)
        try:
            return taken(**differing)
        finally:
            implementation.is_recorded.reset(token)

    is_one = setting == "1"
    assert taken() == taken(is_faster=False) == is_one
    assert taken_in_recorded_steps() == (setting != "0")
    assert taken_in_recorded_steps(is_faster=False) == is_one
    assert not taken_in_recorded_steps(trains=False)


def test_it_is_faster_where_that_was_measured(triton_torch, monkeypatch):
    import torch

    capability = [9, 0]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda _: tuple(capability)
    )
    precision = ["highest"]
    monkeypatch.setattr(
        torch, "get_float32_matmul_precision", lambda: precision[0]
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x = torch.zeros(128, 2, 3)
    assert triton_torch.is_faster(x.bfloat16())
    assert not triton_torch.is_faster(x.half())
    assert not triton_torch.is_faster(x)  # as PyTorch has it by itself
    precision[:] = ["high"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not triton_torch.is_faster(x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert triton_torch.is_faster(x)
    assert not triton_torch.is_faster(torch.zeros(129, 2, 3))
    capability[:] = 8, 0
    assert not triton_torch.is_faster(x)
    capability[:] = 9, 0
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not triton_torch.is_faster(x)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("No module named 'triton'"),
        RuntimeError("Failed to find C compiler.\nGive one."),
        subprocess.CalledProcessError(1, "gcc"),
        PermissionError(13, "Permission denied"),
    ],
)
def test_where_triton_cannot_start_steps_are_cudnns_and_one_line_says_so(
    monkeypatch, caplog, error
):
    from multilstm.ops import evidence
    from multilstm.ops import torch as implementation

    def fail():
        raise error

    implementation._triton_torch_or_why_not.cache_clear()
    monkeypatch.setattr(evidence, "_explained", set())
    if isinstance(error, ImportError):
        monkeypatch.setattr(implementation, "_triton_torch", fail)
    else:
        module = SimpleNamespace(prepare=fail)
        monkeypatch.setattr(implementation, "_triton_torch", lambda: module)
    monkeypatch.setattr(implementation, "_TRITON", "recorded")
    token = implementation.is_recorded.set(True)
    try:
        for _ in range(2):
            x = SimpleNamespace(is_cuda=True)
            assert not implementation._is_for_triton(x)
    finally:
        implementation.is_recorded.reset(token)
        implementation._triton_torch_or_why_not.cache_clear()
    assert caplog.messages == [
        "torch: LSTMs train by cuDNN, since Triton, which is faster, cannot "
        f"start: {str(error).splitlines()[0]}"
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.export
def test_a_compiler_is_not_asked_what_is_recorded():
    import torch

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return ops.lstm(*tensors)[0]

    units = 4
    shapes = (2, 3, 5), (2, units), (2, units), (5, 16), (units, 16), (16,)
    tensors = tuple(torch.ones(shape) for shape in shapes)
    exported = torch.export.export(Layer(), tensors, strict=True)
    torch.testing.assert_close(
        exported.module()(*tensors), ops.lstm(*tensors)[0]
    )


def in_new_process(code, **environment):
    """What that code says, in a process with this environment."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_model_learns_as_without_it(triton_torch):
    code = """
        import json, sys
        import numpy as np
        from multilstm import LanguageModel, ops

        ids = np.random.default_rng(0).integers(11, size=(2, 6, 3, 5))
        model = LanguageModel.from_preset(
            "awd", vocabulary_size=11, units=(6, 6, 4), embedding_dim=4,
            initializer_scale=0.5,
        )
        model.compile()
        losses = [
            float(model.train_on_batch(x, y)[0])
            for x, y in zip(*ids, strict=True)
        ]
        print(json.dumps([ops.last_kernel(), losses]))
    """
    said = []
    for environment in ({}, {"MULTILSTM_TRITON": "1"}):
        done = in_new_process(code, **environment)
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout.splitlines()[-1]))
    (before, losses), (after, same_losses) = said
    assert before != after == "torch: triton"
    np.testing.assert_allclose(same_losses, losses, rtol=1e-4)
    assert losses[0] != losses[1]


def test_without_triton_one_line_says_what_to_do():
    code = """
        import sys
        sys.modules["triton"] = None
        import multilstm.ops
    """
    done = in_new_process(code, MULTILSTM_TRITON="1")
    assert done.returncode == 1
    [*_, last] = done.stderr.splitlines()
    assert last.startswith(
        "multilstm.errors.UserError: MULTILSTM_TRITON=1 needs Triton, which "
        "comes with PyTorch for CUDA; it cannot be imported ("
    )


def test_another_setting_is_refused_in_one_line():
    done = in_new_process("import multilstm.ops", MULTILSTM_TRITON="yes")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "multilstm.errors.UserError: MULTILSTM_TRITON must be 0, 1 or left "
        "out; received 'yes'."
    )


def test_it_compiles_for_gpus_with_little_shared_memory_and_with_much():
    """For sm_80 and sm_90, by Triton's own compiler, which needs no GPU.

    The last is what an H200 has.
    """
    pytest.importorskip("triton", reason="Triton is for Linux")
    code = """
        import json
        import torch
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from multilstm.ops import triton_torch

        found = []
        for capability, rows, dtype, name, kilobytes, processors in (
            (80, 20, "float32", "fp32", 99, 7),
            (90, 20, "bfloat16", "bf16", 99, 7),
            (90, 128, "float32", "fp32", 99, 7),
            (90, 20, "float32", "fp32", 227, 132),
            (90, 80, "float32", "fp32", 227, 132),
        ):
            memory = 1024 * kilobytes
            triton_torch._shared_memory = lambda device: memory
            triton_torch._processors = lambda device: processors
            half_or_whole = getattr(torch, dtype)
            blocks = triton_torch.Blocks()
            left = torch.zeros(1, rows, 4 * 1152, dtype=half_or_whole)
            right = torch.zeros(1152, 4 * 1152, dtype=half_or_whole)
            product = triton_torch._Product(blocks, left, right)
            width = 4 * blocks.units
            for kernel, options in (
                (
                    triton_torch._step,
                    triton_torch._options(blocks, rows, left, width)
                    | {"SIZE": 1152, "PARTS": 0, "UNITS": blocks.units},
                ),
                (triton_torch._multiply, product.options),
                (
                    triton_torch._step_back,
                    {
                        "SIZE": 1152,
                        "PARTS": len(product.parts),
                        "ROWS": product.options["ROWS"],
                        "UNITS": blocks.units,
                        "num_warps": blocks.warps,
                        "num_stages": 1,
                    },
                ),
            ):
                fixed = dict(options)
                warps = fixed.pop("num_warps"), fixed.pop("num_stages")
                kinds = {"step": "i32", "batch": "i32"}
                kinds |= dict.fromkeys(("c", "dc", "parts"), "*fp32")
                kinds |= dict.fromkeys(fixed, "constexpr")
                names = kernel.arg_names
                compiled = triton.compile(
                    ASTSource(
                        fn=kernel,
                        signature={n: kinds.get(n, "*" + name) for n in names},
                        constexprs={
                            (names.index(n),): value
                            for n, value in fixed.items()
                        },
                        attrs={
                            (place,): [["tt.divisibility", 16]]
                            for place, n in enumerate(names)
                            if kinds.get(n, "*").startswith("*")
                        },
                    ),
                    target=GPUTarget("cuda", capability, 32),
                    options=dict(zip(("num_warps", "num_stages"), warps)),
                )
                found.append(
                    [
                        compiled.metadata.shared <= memory,
                        kernel is triton_torch._step_back
                        or "mma" in compiled.asm["ptx"]
                        and "cp.async" in compiled.asm["ptx"],
                    ]
                )
        print(json.dumps(found))
    """
    done = in_new_process(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 15
    for has_room, multiplies_on_tensor_cores_and_loads_ahead in found:
        assert has_room
        assert multiplies_on_tensor_cores_and_loads_ahead


def test_the_doctor_takes_it_for_a_fast_one_on_a_gpu():
    assert is_fast("torch: triton", gpu=True)
    assert not is_fast("torch: triton", gpu=False)
