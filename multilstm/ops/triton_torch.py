"""PyTorch on a GPU: an LSTM of a kernel or two for a time step, in Triton.

cuDNN cuts the product of a time step into few pieces for a GPU. Here, there, a
program computes a few units with all four of their gates: it reads the state
of all units and its own part of the weights, once, and has its part of the
next state at the end. On the way back the inner side, all gates' gradients, is
four times as long: programs of one kernel each take a part of it too, and
another kernel adds up the parts and goes through the gates. What does not wait
for the step before, the inputs' projection and the gradients of the matrices,
are large products as ever. On an H200 with TF32 products it is 1.9 times as
fast as cuDNN for 20 rows of 650 units, 2.3 times for 20 of 1,150
(benchmarks/recurrence.py).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from multilstm.ops.bfloat16_torch import LSTM_ONCE, once_differentiable
from multilstm.ops.evidence import note_kernel

# Where no GPU says it: shared memory of those with the least, and so few
# processors that parts of a product are of several pieces.
_SHARED_MEMORY = 99 * 1024
_PROCESSORS = 7


@dataclass(frozen=True)
class Blocks:
    """How the products of a time step are cut; as was fastest on an H200.

    Attributes:
        units: Of a program that goes through the gates; 8 or more.
        columns: Of a program with a part of a product; `inner` or less.
        inner: Of the product's inner side, how much at once. A multiple of
            `units`, to which the number of units is padded.
        most_rows: Of a program, as it has registers for.
        stages: Parts of the inner side that are on their way at a time.
        warps: Of a program.
        programs: With a part of a product, for each processor of the GPU.
        in_parts: Whether the product is in parts there too, not back alone.
    """

    units: int = 16
    columns: int = 64
    inner: int = 64
    most_rows: int = 128
    stages: int = 4
    warps: int = 8
    # Not measured yet otherwise than so:
    programs: int = 1
    in_parts: bool = False


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


def prepare() -> None:
    """Raises what a first launch would where there is no compiler, say."""
    if torch.cuda.is_available():
        _ = triton.runtime.driver.active.utils  # in C, compiled when needed


def is_faster(x: Any) -> bool:
    """Whether that has been seen to be faster than cuDNN, once recorded.

    So it was on an H200 for 20 rows of 650 and 20 and 80 rows of 1,150 units
    in TF32, and in bfloat16 for the first and the last of these; not for
    products in whole float32, for which there are no tensor cores.
    """
    is_tf32 = (
        x.dtype == torch.float32
        and torch.backends.cudnn.allow_tf32
        and torch.get_float32_matmul_precision() != "highest"
    )
    return bool(
        torch.version.cuda
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and len(x) <= Blocks.most_rows
        and (is_tf32 or x.dtype == torch.bfloat16)
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
    return y, y[:, -1], c[:, :units].to(c0.dtype)


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
        order = (1, 2, 0) if blocks.in_parts else (2, 1, 0)
        rows = kernel.permute(order).flatten(0, 1).contiguous()
        product = _Product(blocks, h, rows) if blocks.in_parts else None
        parts = product.parts if product else sums  # which nothing reads
        options = _options(blocks, batch, h, 4 * blocks.units)
        grid = units // blocks.units, triton.cdiv(batch, options["ROWS"])
        with torch.cuda.device_of(sums):  # not that which is current
            for step in range(time):
                if product:
                    product(step)
                _step[grid](
                    *(step, batch, sums, gates, h, c, rows, parts, units),
                    PARTS=len(parts) if product else 0,
                    UNITS=blocks.units,
                    **options,
                )
        y = h[1:]  # saved too: the kernel may need no gradient
        ctx.save_for_backward(gates, h, c, kernel, y)
        ctx.blocks = blocks
        ctx.set_materialize_grads(False)
        return y, c[-1]

    @staticmethod
    @once_differentiable(LSTM_ONCE)
    def backward(ctx: Any, saved: Any, dy: Any, dc: Any) -> tuple[Any, ...]:
        gates, h, c, kernel, _ = saved
        time, batch, _, units = gates.shape
        dy = torch.zeros_like(h[1:]) if dy is None else dy.contiguous()
        if dc is None:
            dc = torch.zeros_like(c[0])
        else:  # to be written to, and row by row however it came
            dc = dc.clone(memory_format=torch.contiguous_format)
        d_sums = torch.empty_like(gates)
        product = _Product(
            ctx.blocks, d_sums.flatten(2), kernel.contiguous().flatten(1)
        )
        rows = product.options["ROWS"]
        grid = units // ctx.blocks.units, triton.cdiv(batch, rows)
        for step in reversed(range(time)):
            is_last = step == time - 1
            if not is_last:
                product(step + 1)
            _step_back[grid](
                *(step, batch, gates, c, dy, d_sums, dc, product.parts, units),
                PARTS=0 if is_last else len(product.parts),
                ROWS=rows,
                UNITS=ctx.blocks.units,
                num_warps=ctx.blocks.warps,
            )
        d_h0 = d_kernel = None
        if ctx.needs_input_grad[1]:
            d_h0 = d_sums[0].flatten(1) @ kernel.flatten(1).T
        if ctx.needs_input_grad[3]:
            before = h[:-1].flatten(0, 1)
            d_kernel = before.T @ d_sums.view(time * batch, -1)
            d_kernel = d_kernel.view(kernel.shape)
        return d_sums, d_h0, dc, d_kernel, None


class _Product:
    """A time step's rows times a matrix; of sums the parts, for another kernel.

    Args:
        blocks: How it is cut.
        left: Of shape `(time, batch, inner side)`.
        right: Of shape `(columns, inner side)`, row by row.

    Attributes:
        parts: Of shape `(number of parts, batch, columns)`, of the last step
            that was asked for.
    """

    def __init__(self, blocks: Blocks, left: Any, right: Any) -> None:
        self.left, self.right = left, right
        self.batch = left.shape[1]
        size, depth = right.shape
        self.options = _options(blocks, self.batch, left, blocks.columns)
        blocks_of_rows = triton.cdiv(self.batch, self.options["ROWS"])
        tiles = size // blocks.columns * blocks_of_rows
        most_parts = max(1, blocks.programs * _processors(left.device) // tiles)
        pieces = depth // self.options["INNER"]
        in_a_part = triton.cdiv(pieces, most_parts)
        parts = triton.cdiv(pieces, in_a_part)
        self.grid = size // blocks.columns, blocks_of_rows, parts
        self.options |= {
            "SIZE": size,
            "DEPTH": depth,
            "COLUMNS": blocks.columns,
            "PIECES": in_a_part,
        }
        shape = parts, self.batch, size
        self.parts = left.new_empty(shape, dtype=torch.float32)

    def __call__(self, step: int) -> None:
        """Starts the product of `left[step]`."""
        _multiply[self.grid](
            *(step, self.batch, self.left, self.right, self.parts),
            **self.options,
        )


def _options(
    blocks: Blocks, batch: int, left: Any, width: int
) -> dict[str, Any]:
    """How a program multiplies.

    Args:
        blocks: As asked for, but less of the inner side at once where there
            is no room for two stages, and no more stages than there is for.
        batch: Rows.
        left: The factor that has them.
        width: Columns of a program.
    """
    inner = blocks.inner
    # A power of 2, and what tensor cores take.
    rows = min(max(int(triton.next_power_of_2(batch)), 16), blocks.most_rows)
    room = _shared_memory(left.device) // blocks.programs
    room //= (rows + width) * left.element_size()
    while inner > 16 and 2 * inner > room:  # for two stages
        inner //= 2
    return {
        "ROWS": rows,
        "INNER": inner,
        "PRECISION": "tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        "num_warps": blocks.warps,
        "num_stages": max(1, min(blocks.stages, room // inner)),
    }


@lru_cache
def _shared_memory(device: Any) -> int:
    if device.type != "cuda":
        return _SHARED_MEMORY
    utils = triton.runtime.driver.active.utils
    return int(utils.get_device_properties(device.index)["max_shared_mem"])


@lru_cache
def _processors(device: Any) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit(do_not_specialize=["step"])
def _multiply(
    step,
    batch,
    left,
    right,
    parts,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a block of a step's product what a part of its inner side gives."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = (row < batch)[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    part = tl.program_id(2)
    place = (tl.cast(step, tl.int64) * batch + row)[:, None]  # in time

    inner = tl.arange(0, INNER)
    states = left + place * DEPTH + inner[None, :]
    matrix = right + column * DEPTH + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = part * (PIECES * INNER)
    for first in range(begin, tl.minimum(begin + PIECES * INNER, DEPTH), INNER):
        some = tl.load(states + first, mask=is_row, other=0.0)
        weights = tl.load(matrix + first)
        total = tl.dot(some, weights, total, input_precision=PRECISION)
    place_in_parts = (part * batch + row)[:, None] * SIZE + column
    tl.store(parts + place_in_parts, total, mask=is_row)


@triton.jit(do_not_specialize=["step"])
def _step(
    step,
    batch,
    sums,
    gates,
    h,
    c,
    weights,
    parts,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`h[step + 1]`, `c[step + 1]` and `gates[step]` of a program's units.

    The product is computed here, or added up from its parts where it has some.
    """
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

    if PARTS:
        more_i = tl.zeros((ROWS, UNITS), tl.float32)
        more_f, more_g, more_o = more_i, more_i, more_i
        found = parts + row[:, None] * (4 * SIZE) + unit
        for _ in tl.static_range(PARTS):
            more_i += tl.load(found, mask=is_row, other=0.0)
            more_f += tl.load(found + SIZE, mask=is_row, other=0.0)
            more_g += tl.load(found + 2 * SIZE, mask=is_row, other=0.0)
            more_o += tl.load(found + 3 * SIZE, mask=is_row, other=0.0)
            found += batch * (4 * SIZE)
    else:
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
    parts,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """`d_sums[step]` of a program's units, and `dc` for the step before.

    The gradient of `h[step + 1]` comes in parts from the step after.
    """
    part = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = (row < batch)[:, None]
    unit = (part * UNITS + tl.arange(0, UNITS))[None, :]
    place = (tl.cast(step, tl.int64) * batch + row)[:, None]  # in time

    dh = tl.zeros((ROWS, UNITS), tl.float32)
    found = parts + row[:, None] * SIZE + unit
    for _ in tl.static_range(PARTS):
        dh += tl.load(found, mask=is_row, other=0.0)
        found += batch * SIZE
    gate = place * (4 * SIZE) + unit
    i = tl.load(gates + gate, mask=is_row).to(tl.float32)
    f = tl.load(gates + gate + SIZE, mask=is_row).to(tl.float32)
    g = tl.load(gates + gate + 2 * SIZE, mask=is_row).to(tl.float32)
    o = tl.load(gates + gate + 3 * SIZE, mask=is_row).to(tl.float32)
    before = place * SIZE + unit
    old_c = tl.load(c + before, mask=is_row)
    new_c = tl.load(c + before + batch * SIZE, mask=is_row)
    dh += tl.load(dy + before, mask=is_row)
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
