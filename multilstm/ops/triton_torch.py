"""PyTorch on a GPU: an LSTM whose time step is one kernel, in Triton.

cuDNN starts at least two kernels for a time step, a product that is far too
small for the GPU and then the gates; at 20 rows a step of either way takes
some 28 us on an H200, six times what it takes to read the weights. Here a
program computes a few units with all four of their gates: it reads the state
of all units and its own part of the weights, once, and has its part of the
next state at the end. A step of the way back is one kernel likewise. What
does not wait for the step before, the inputs' projection and the gradients of
the matrices, are large products as ever.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from multilstm.ops.evidence import note_kernel

# Of a program, where no GPU says it: that of those with the least.
_SHARED_MEMORY = 99 * 1024


@dataclass(frozen=True)
class Blocks:
    """How the products of a time step are cut.

    Not one of these numbers has been measured against another yet.

    Attributes:
        units: Of a program, with their four gates; 8 or more.
        inner: Of the product's inner side, how much at once. A multiple of
            `units`, to which the number of units is padded.
        most_rows: Of a program, as it has registers for.
        stages: Parts of the inner side that are on their way at a time.
        warps: Of a program with fewer than `most_rows` rows; twice as many
            with these.
    """

    units: int = 16
    inner: int = 64
    most_rows: int = 128
    stages: int = 4
    warps: int = 4


def is_for(x: Any) -> bool:
    """Whether a batch is to be read here: where a gradient may be wanted.

    Without, a layer is one call for cuDNN, but a kernel a step here, which
    costs more where nothing is recorded.
    """
    return bool(
        (x.is_cuda or triton.knobs.runtime.interpret)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.numel()
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def lstm(
    x: Any,
    h0: Any,
    c0: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    blocks: Blocks = Blocks(),
) -> tuple[Any, Any, Any]:
    """As `reference.lstm`; the cell state is kept in float32.

    The units are padded to a multiple of `blocks.inner`: those stay zero,
    since from a sum of zero comes a candidate, tanh(0), of zero.
    """
    note_kernel("torch: triton")
    dtype = x.dtype
    batch, time, _ = x.shape
    units = recurrent_kernel.shape[0]
    missing = -units % blocks.inner
    kernel, recurrent_kernel, bias = (
        tensor.to(dtype).unflatten(-1, (4, units))
        for tensor in (kernel, recurrent_kernel, bias)
    )
    gates = torch.addmm(
        _pad(bias, missing).flatten(),
        x.transpose(0, 1).flatten(0, 1),
        _pad(kernel, missing).flatten(1),
    )
    y, c = _Recurrence.apply(
        gates.view(time, batch, 4, units + missing),
        _pad(h0.to(dtype), missing),
        _pad(c0.float(), missing),
        _pad(recurrent_kernel, missing, 0, 0, 0, missing),
        blocks,
    )
    y = y[..., :units].transpose(0, 1)
    return y, y[:, -1], c[:, :units].to(dtype)


def _pad(tensor: Any, missing: int, *more: int) -> Any:
    """With zeros after the last side, and where `more` says it, as PyTorch."""
    if not missing:
        return tensor
    return torch.nn.functional.pad(tensor, (0, missing, *more))


class _Recurrence(torch.autograd.Function):
    """Of the gates' sums without the state's part the outputs.

    Shapes: sums `(time, batch, 4, units)`, states `(batch, units)`, kernel
    `(units, 4, units)`, outputs `(time, batch, units)`.
    """

    @staticmethod
    def forward(
        ctx: Any, sums: Any, h0: Any, c0: Any, kernel: Any, blocks: Blocks
    ) -> tuple[Any, Any]:
        time, batch, _, units = sums.shape
        h = h0.new_empty(time + 1, batch, units)
        c = c0.new_empty(time + 1, batch, units)
        h[0], c[0] = h0, c0
        gates = torch.empty_like(sums)
        # A row for each unit and gate, as tensor cores like to read it.
        rows = kernel.permute(2, 1, 0).contiguous()
        grid, options = _launch(blocks, batch, h)
        for step in range(time):
            _step[grid](step, batch, sums, gates, h, c, rows, units, **options)
        ctx.save_for_backward(gates, h, c, kernel)
        ctx.blocks = blocks
        ctx.set_materialize_grads(False)
        return h[1:], c[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, dc: Any) -> tuple[Any, ...]:
        gates, h, c, kernel = ctx.saved_tensors
        time, batch, _, units = gates.shape
        dy = torch.zeros_like(h[1:]) if dy is None else dy.contiguous()
        if dc is None:
            dc = torch.zeros_like(c[0])
        else:  # to be written to, and row by row however it came
            dc = dc.clone(memory_format=torch.contiguous_format)
        d_sums = torch.empty_like(gates)
        rows = kernel.contiguous()  # one for each unit
        grid, options = _launch(ctx.blocks, batch, h, is_back=True)
        for step in reversed(range(time)):
            _step_back[grid](
                *(step, batch, gates, c, dy, d_sums, dc, rows, units),
                IS_LAST=step == time - 1,
                **options,
            )
        d_h0 = d_kernel = None
        if ctx.needs_input_grad[1]:
            d_h0 = d_sums[0].flatten(1) @ kernel.flatten(1).T
        if ctx.needs_input_grad[3]:
            before = h[:-1].flatten(0, 1)
            d_kernel = before.T @ d_sums.view(time * batch, -1)
            d_kernel = d_kernel.view(kernel.shape)
        return d_sums, d_h0, dc, d_kernel, None


def _launch(
    blocks: Blocks, batch: int, h: Any, *, is_back: bool = False
) -> tuple[tuple[int, int], dict[str, Any]]:
    """How many programs, and how each of them multiplies.

    Args:
        blocks: As asked for, but less of the inner side at once where there
            is no room for two stages, and no more stages than there is for.
        batch: Rows.
        h: States, of shape `(..., units)`.
        is_back: Whether for the way back, with a fourth of the columns and
            four times the inner side, of which twice as much goes at once.
    """
    width, inner = 4 * blocks.units, blocks.inner
    if is_back:
        width, inner = blocks.units, 2 * blocks.inner
    rows = min(max(triton.next_power_of_2(batch), 16), blocks.most_rows)
    room = _shared_memory(h.device) // ((rows + width) * h.element_size())
    while inner > 16 and 2 * inner > room:  # for two stages
        inner //= 2
    grid = h.shape[-1] // blocks.units, triton.cdiv(batch, rows)
    return grid, {
        "ROWS": rows,
        "UNITS": blocks.units,
        "INNER": inner,
        "PRECISION": "tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        "num_warps": blocks.warps * (2 if rows == blocks.most_rows else 1),
        "num_stages": max(1, min(blocks.stages, room // inner)),
    }


@lru_cache
def _shared_memory(device: Any) -> int:
    if device.type != "cuda":
        return _SHARED_MEMORY
    utils = triton.runtime.driver.active.utils
    return int(utils.get_device_properties(device.index)["max_shared_mem"])


@triton.jit(do_not_specialize=["step"])
def _step(
    step,
    batch,
    sums,
    gates,
    h,
    c,
    weights,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`h[step + 1]`, `c[step + 1]` and `gates[step]` of a program's units."""
    part = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = (row < batch)[:, None]
    unit = (part * UNITS + tl.arange(0, UNITS))[None, :]
    place = (tl.cast(step, tl.int64) * batch + row)[:, None]  # in time

    # On their way while the product is computed.
    gate = place * (4 * SIZE) + unit
    i = tl.load(sums + gate, mask=is_row)
    f = tl.load(sums + gate + SIZE, mask=is_row)
    g = tl.load(sums + gate + 2 * SIZE, mask=is_row)
    o = tl.load(sums + gate + 3 * SIZE, mask=is_row)
    before = place * SIZE + unit
    after = before + batch * SIZE
    old_c = tl.load(c + before, mask=is_row)

    inner = tl.arange(0, INNER)
    column = part * (4 * UNITS) + tl.arange(0, 4 * UNITS)
    left = h + place * SIZE + inner[None, :]
    right = weights + column[None, :] * SIZE + inner[:, None]
    total = tl.zeros((ROWS, 4 * UNITS), tl.float32)
    for first in range(0, SIZE, INNER):
        states = tl.load(left + first, mask=is_row, other=0.0)
        matrix = tl.load(right + first)
        total = tl.dot(states, matrix, total, input_precision=PRECISION)
    # Columns are units times gates: 4 * unit + 2 * high + low.
    even, odd = tl.split(tl.reshape(total, (ROWS, UNITS, 2, 2)))
    more_i, more_g = tl.split(even)
    more_f, more_o = tl.split(odd)

    i = _sigmoid(i + more_i)
    f = _sigmoid(f + more_f)
    g = _tanh(g + more_g)
    o = _sigmoid(o + more_o)
    new_c = f * old_c + i * g
    tl.store(c + after, new_c, mask=is_row)
    tl.store(h + after, o * _tanh(new_c), mask=is_row)
    tl.store(gates + gate, i, mask=is_row)
    tl.store(gates + gate + SIZE, f, mask=is_row)
    tl.store(gates + gate + 2 * SIZE, g, mask=is_row)
    tl.store(gates + gate + 3 * SIZE, o, mask=is_row)


@triton.jit(do_not_specialize=["step"])
def _step_back(
    step,
    batch,
    gates,
    c,
    dy,
    d_sums,
    dc,
    weights,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    """`d_sums[step]` of a program's units, and `dc` for the step before."""
    part = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = (row < batch)[:, None]
    unit = (part * UNITS + tl.arange(0, UNITS))[None, :]
    place = (tl.cast(step, tl.int64) * batch + row)[:, None]  # in time

    total = tl.zeros((ROWS, UNITS), tl.float32)
    if not IS_LAST:
        inner = tl.arange(0, INNER)
        left = d_sums + (place + batch) * (4 * SIZE) + inner[None, :]
        right = weights + unit * (4 * SIZE) + inner[:, None]
        for first in range(0, 4 * SIZE, INNER):
            later = tl.load(left + first, mask=is_row, other=0.0)
            matrix = tl.load(right + first)
            total = tl.dot(later, matrix, total, input_precision=PRECISION)
        # A sum over one number: else all that is loaded below is brought into
        # the order of the product, through shared memory, instead of this
        # alone. (So it is too where those loads stand above the product.)
        total = tl.sum(tl.reshape(total, (ROWS, UNITS, 1)), 2)

    gate = place * (4 * SIZE) + unit
    i = tl.load(gates + gate, mask=is_row).to(tl.float32)
    f = tl.load(gates + gate + SIZE, mask=is_row).to(tl.float32)
    g = tl.load(gates + gate + 2 * SIZE, mask=is_row).to(tl.float32)
    o = tl.load(gates + gate + 3 * SIZE, mask=is_row).to(tl.float32)
    before = place * SIZE + unit
    old_c = tl.load(c + before, mask=is_row)
    new_c = tl.load(c + before + batch * SIZE, mask=is_row)
    dh = total + tl.load(dy + before, mask=is_row)
    carried = dc + row[:, None] * SIZE + unit
    d_new = tl.load(carried, mask=is_row)

    tanh_c = _tanh(new_c)
    d_new += dh * o * (1 - tanh_c * tanh_c)
    tl.store(carried, d_new * f, mask=is_row)
    tl.store(d_sums + gate, d_new * g * i * (1 - i), mask=is_row)
    tl.store(d_sums + gate + SIZE, d_new * old_c * f * (1 - f), mask=is_row)
    tl.store(d_sums + gate + 2 * SIZE, d_new * i * (1 - g * g), mask=is_row)
    tl.store(d_sums + gate + 3 * SIZE, dh * tanh_c * o * (1 - o), mask=is_row)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1
