"""PyTorch on a CPU in bfloat16: its products, with the cell state in float32.

`torch.lstm` would keep the cell state in bfloat16, where it stays as it is
when less than a 256th of it is added.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from multilstm.errors import UserError
from multilstm.ops.evidence import note_kernel

# ATen's words for one layer in one direction, time before batch.
_FORM: dict[str, Any] = {
    "reverse": False,
    "batch_sizes": [],
    "mode": 2,  # an LSTM, among its kinds of recurrent layers
    "num_layers": 1,
    "has_biases": True,
    "bidirectional": False,
    "batch_first": False,
}
LSTM_ONCE = (
    "This LSTM's kernel has no second derivatives; one was asked for. Use "
    "keras.layers.LSTM(use_cudnn=False) where a loss has gradients in it."
)
# oneDNN adds to the gradient of the matrices at every time step, which is
# slow once that does not stay in a cache. Measured on two cores of an EPYC of
# Zen 5 (benchmarks/bfloat16_lstm.py): 800 units are faster by oneDNN, 1,150
# by the loop.
_MOST_WEIGHTS = 6_000_000


def is_fast(x: Any) -> bool:
    """Whether the processor multiplies in bfloat16: emulated it is slow.

    Of no rows or no steps `torch.lstm` knows what to say, oneDNN does not.
    """
    return bool(
        not torch.compiler.is_compiling()
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel()
        and torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_bf16_supported()
    )


def lstm(
    x: Any, h0: Any, c0: Any, kernel: Any, recurrent_kernel: Any, bias: Any
) -> tuple[Any, Any, Any]:
    """As `reference.lstm`, of weights in bfloat16 or in float32."""
    is_large = kernel.numel() + recurrent_kernel.numel() > _MOST_WEIGHTS
    function = _Loop if is_large else _OneDNN
    arguments = (x.transpose(0, 1), h0, c0, kernel, recurrent_kernel, bias)
    y, h, c = function.apply(torch.is_grad_enabled(), *arguments)
    return y.transpose(0, 1), h, c.to(c0.dtype)


def _prepare(
    x: Any, h0: Any, c0: Any, kernel: Any, recurrent_kernel: Any, bias: Any
) -> tuple[Any, ...]:
    """Matrices transposed, all in the dtype it needs and stored row by row.

    The operation of oneDNN reads what it gets as if it were stored so.
    """
    half = torch.bfloat16
    wanted = (
        x,
        kernel.to(half).T,
        recurrent_kernel.to(half).T,
        bias.float(),
        h0.to(half),
        c0.float(),
    )
    return tuple(tensor.detach().contiguous() for tensor in wanted)


def once_differentiable(told: str) -> Callable[[Any], Any]:
    """Makes a `backward` whose gradients have none, and say so.

    PyTorch's decorator of that name tells it only where the gradient from
    above needs one. After a sum it does not, and what was differentiated twice
    would count nothing.

    Args:
        told: What a `UserError` says where a second derivative is asked for.

    Returns:
        A decorator of `backward(ctx, saved, *gradients)`, where `saved` is
        `ctx.saved_tensors`, which may be read but once. Among them is an
        input or an output, through which the error is reached.
    """

    def decorate(backward: Any) -> Any:
        @wraps(backward)
        def wrapper(ctx: Any, *gradients: Any) -> Any:
            saved = ctx.saved_tensors
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            if not torch.is_grad_enabled():  # without create_graph=True
                return results
            return _Once.apply(told, results, *saved, *gradients)

        return wrapper

    return decorate


class _Once(torch.autograd.Function):
    """Gradients as they are, from what a second derivative would go to."""

    @staticmethod
    def forward(ctx: Any, told: str, results: Any, *origins: Any) -> Any:
        ctx.told = told
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UserError(ctx.told)


class _OneDNN(torch.autograd.Function):
    """The operation under `torch.lstm`, which takes a cell state in float32.

    Its gradients are in float32; autograd casts them where that is not wanted.
    """

    @staticmethod
    def forward(ctx: Any, train: bool, *arguments: Any) -> tuple[Any, Any, Any]:
        note_kernel("torch: onednn")
        x, kernel, recurrent, bias, h0, c0 = _prepare(*arguments)
        zeros = torch.zeros_like(bias)
        inputs = (x, kernel, recurrent, bias, zeros, h0[None], c0[None])
        # Without gradients it makes no workspace, whatever `train` is.
        with torch.set_grad_enabled(train):
            y, h, c, workspace = torch.ops.aten.mkldnn_rnn_layer.default(
                *inputs, hidden_size=h0.shape[1], train=train, **_FORM
            )
        ctx.save_for_backward(*inputs, y, h, c, workspace)
        return y, h[0], c[0]

    @staticmethod
    @once_differentiable(LSTM_ONCE)
    def backward(
        ctx: Any, saved: Any, dy: Any, dh: Any, dc: Any
    ) -> tuple[Any, ...]:
        *inputs_and_outputs, workspace = saved
        dx, d_kernel, d_recurrent, d_bias, _, dh0, dc0 = (
            torch.ops.aten.mkldnn_rnn_layer_backward.default(
                *inputs_and_outputs,
                dy.contiguous(),
                dh[None],
                dc[None],
                hidden_size=dh.shape[1],
                train=True,
                workspace=workspace,
                **_FORM,
            )
        )
        d_weights = (d_kernel.T, d_recurrent.T, d_bias)
        return None, dx, dh0[0], dc0[0], *d_weights


class _Loop(torch.autograd.Function):
    """A loop over the time steps, with the gradient of the matrices in one."""

    @staticmethod
    def forward(ctx: Any, train: bool, *arguments: Any) -> tuple[Any, Any, Any]:
        note_kernel("torch: loop, products by onednn")
        x, kernel, recurrent, bias, h0, c0 = _prepare(*arguments)
        time, batch, _ = x.shape
        units = recurrent.shape[1]
        gates = _product(x.flatten(0, 1), kernel).float().add_(bias)
        gates = gates.view(time, batch, 4 * units)
        y = torch.cat([h0[None], h0.new_empty(time, batch, units)])
        c = torch.cat([c0[None], c0.new_empty(time, batch, units)])
        for step in range(time):
            gate = gates[step].add_(_product(y[step], recurrent))
            i, f, g, o = gate.chunk(4, 1)
            gate[:, : 2 * units].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, c[step], out=c[step + 1]).addcmul_(i, g)
            y[step + 1] = torch.tanh(c[step + 1]).mul_(o)
        outputs = y[1:]  # saved too: the others lead to no input
        ctx.save_for_backward(x, kernel, recurrent, gates, y, c, outputs)
        return outputs, y[-1], c[-1]

    @staticmethod
    @once_differentiable(LSTM_ONCE)
    def backward(
        ctx: Any, saved: Any, dy: Any, dh: Any, dc: Any
    ) -> tuple[Any, ...]:
        x, kernel, recurrent, gates, y, c, _ = saved
        i, f, g, o = gates.chunk(4, 2)
        tanh_c = torch.tanh(c[1:])
        # By how much a gate's sum changes the cell state or the output, and
        # how much the cell state changes the output.
        slopes = torch.stack(
            [
                i * g * (1 - i),
                f * c[:-1] * (1 - f),
                i * (1 - g * g),
                o * tanh_c * (1 - o),
            ],
            2,
        )
        through_tanh = o * (1 - tanh_c * tanh_c)
        d_gates = x.new_empty(gates.shape)
        dy = dy.float()
        dh, dc = dh.float(), dc.clone()
        back = recurrent.T.contiguous()
        for step in reversed(range(len(x))):
            dh = dh + dy[step]
            dc.addcmul_(dh, through_tanh[step])
            d_gate = slopes[step]
            d_gate[:, :3].mul_(dc[:, None])
            d_gate[:, 3].mul_(dh)
            d_gates[step] = d_gate.flatten(1)
            dh = _product(d_gates[step], back).float()
            dc.mul_(f[step])
        flat = d_gates.flatten(0, 1)
        dx = _product(flat, kernel.T.contiguous()).view(x.shape)
        across = flat.T.contiguous()
        d_kernel = _product(across, x.flatten(0, 1).T.contiguous())
        d_recurrent = _product(across, y[:-1].flatten(0, 1).T.contiguous())
        d_bias = flat.sum(0, dtype=torch.float32)
        return None, dx, dh, dc, d_kernel.T, d_recurrent.T, d_bias


def _product(left: Any, transposed: Any) -> Any:
    """`left @ transposed.T`, both of them stored row by row."""
    return torch.ops.mkldnn._linear_pointwise(
        left, transposed, None, "none", [], ""
    )
