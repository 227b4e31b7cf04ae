"""PyTorch: its own LSTM kernels, and products by what is fastest on a CPU."""

import importlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import keras
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multilstm.devices import processor_name
from multilstm.errors import UserError
from multilstm.ops import bfloat16_torch, reference
from multilstm.ops.bfloat16_torch import once_differentiable
from multilstm.ops.evidence import explain_once, note_kernel

# By default Triton's LSTM is for steps that are recorded, where it is faster;
# with "1" for all that train, with "0" for none.
_TRITON = os.environ.get("MULTILSTM_TRITON") or "recorded"
if _TRITON not in ("recorded", "0", "1"):
    raise UserError(
        f"MULTILSTM_TRITON must be 0, 1 or left out; received {_TRITON!r}."
    )
is_recorded: ContextVar[bool] = ContextVar("is_recorded", default=False)


def _triton_torch() -> Any:
    return importlib.import_module("multilstm.ops.triton_torch")


if _TRITON == "1":
    try:
        _triton_torch()
    except ImportError as error:
        raise UserError(
            "MULTILSTM_TRITON=1 needs Triton, which comes with PyTorch for "
            f"CUDA; it cannot be imported ({error}). Leave the variable out, "
            "or pip install triton."
        ) from error

# What the dispatcher may call for `torch.lstm`; anything else is its loop.
_FUSED = {
    "mkldnn_rnn_layer": "torch: onednn",
    "_cudnn_rnn": "torch: cudnn",
    "miopen_rnn": "torch: miopen",
}
# Attributes of a bias that is in a block of cuDNN's: where that has zeros
# for a second one, and of how many layers the weights are.
_SECOND_BIAS = "_multilstm_second_bias"
_LAYERS_IN_BLOCK = "_multilstm_layers_in_block"
_CROSS_ENTROPY_ONCE = (
    "This cross-entropy has no second derivatives; one was asked for. Compute "
    "the logits and give them to keras.losses where a loss has gradients in it."
)
# By MKL PyTorch multiplies, and MKL is Intel's. On an AMD processor it reaches
# half the speed of oneDNN, which is in PyTorch too; on Intel's own it is a
# tenth ahead, and twice as fast where oneDNN transposes a large matrix first.
_MKL_IS_FASTER = (
    torch.backends.mkl.is_available() and "intel" in processor_name().lower()
)
_observed: dict[tuple[Any, ...], str] = {}

# Since PyTorch 2.7.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def lstm(
    x: Any,
    h0: Any,
    c0: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    mask: Any = None,
) -> tuple[Any, Any, Any]:
    """As `reference.lstm`, by one call of PyTorch's own LSTM."""
    arguments = (x, h0, c0, kernel, recurrent_kernel, bias)
    if mask is not None:
        return reference.run_masked(
            lstm,
            *arguments,
            mask,
            argsort=_argsort,
            take_along_axis=_take_along_axis,
        )
    y, [(h, c)] = lstm_stack(x, [(h0, c0)], [arguments[3:]])
    return y, h, c


def lstm_stack(
    x: Any,
    states: list[reference.State],
    weights: list[reference.Weights],
) -> tuple[Any, list[reference.State]]:
    """As `reference.lstm_stack`: one call for layers of one size on a GPU.

    Of what comes in bfloat16 the cell state is in float32: in bfloat16, as
    `torch.lstm` would keep it, it stays where it is when less than a 256th of
    it is added. Where oneDNN's kernel does not give that, all is in float32.

    Raises:
        UserError: For states of another shape, which oneDNN would read.
    """
    for state, (_, recurrent, _) in zip(states, weights, strict=True):
        wanted = (x.shape[0], recurrent.shape[0])
        if any(part.shape != wanted for part in state):
            raise UserError(
                f"The states of an LSTM must have the shape {(*wanted,)}, a "
                "row for each of the batch; received "
                f"{' and '.join(str(tuple(part.shape)) for part in state)}."
            )
    if bfloat16_torch.is_fast(x):
        for layer in weights:
            _store_transposed(list(layer))
        return reference.stack(bfloat16_torch.lstm, x, states, weights)
    if _is_for_triton(x):
        for layer in weights:
            # So that neither an evaluation nor a step by cuDNN moves them.
            _store_once_for_cudnn([layer])
        return reference.stack(_triton_torch().lstm, x, states, weights)
    if x.dtype in (torch.bfloat16, torch.float16):
        if x.numel():  # what is empty says nothing of others
            explain_once(
                f"torch: of this model in {str(x.dtype).removeprefix('torch.')}"
                " the LSTMs run in float32, so that their cell states add up."
            )
        y, ends = lstm_stack(
            x.float(),
            [tuple(s.float() for s in state) for state in states],
            [tuple(w.float() for w in layer) for layer in weights],
        )
        narrow = [
            (h.to(x.dtype), c.to(c0.dtype))
            for (h, c), (_, c0) in zip(ends, states, strict=True)
        ]
        return y.to(x.dtype), narrow
    sizes = {recurrent.shape[0] for _, recurrent, _ in weights}
    if len(weights) > 1 and (
        not x.is_cuda
        or len(sizes) > 1
        # As training with dropout between has stored them: to store them
        # together for an evaluation would be undone by the next step.
        or (
            not torch.compiler.is_compiling()
            and all(_fill_a_block([layer]) for layer in weights)
        )
    ):
        return reference.stack(lstm, x, states, weights)
    kind = x.device.type
    # It would have the cell state in bfloat16, too.
    is_autocast = (
        not torch.compiler.is_compiling()
        and torch.amp.is_autocast_available(kind)  # not of "meta"
        and torch.is_autocast_enabled(kind)
    )
    with torch.autocast(kind, enabled=False) if is_autocast else nullcontext():
        y, h, c = _observe(
            torch.lstm,
            x,
            tuple(torch.stack(state) for state in zip(*states, strict=True)),
            _in_torchs_order(weights),
            has_biases=True,
            num_layers=len(weights),
            dropout=0.0,
            train=torch.is_grad_enabled(),
            bidirectional=False,
            batch_first=True,
        )
    return y, list(zip(h, c, strict=True))


def _argsort(keys: Any, axis: int) -> Any:
    # ONNX has a counterpart of this, none of `torch.argsort`.
    return keys.sort(dim=axis).indices


def _take_along_axis(x: Any, places: Any, axis: int) -> Any:
    # Likewise, none of `torch.take_along_dim`.
    places = places.long().expand(x.shape[0], -1, x.shape[2])
    return x.gather(axis, places)


def _is_for_triton(x: Any) -> bool:
    # A variable of a context is nothing for a compiler.
    if _TRITON == "0" or torch.compiler.is_compiling():
        return False
    if _TRITON == "1":
        return bool(_triton_torch().is_for(x))
    if not (is_recorded.get() and x.is_cuda):
        return False
    triton_torch = _triton_torch_or_why_not()
    return bool(
        triton_torch and triton_torch.is_for(x) and triton_torch.is_faster(x)
    )


@lru_cache
def _triton_torch_or_why_not() -> Any:
    try:
        triton_torch = _triton_torch()
        triton_torch.prepare()
    except (
        ImportError,
        OSError,
        RuntimeError,
        subprocess.SubprocessError,  # of the compiler that it calls
    ) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        explain_once(
            "torch: LSTMs train by cuDNN, since Triton, which is faster, "
            f"cannot start: {reason}"
        )
        return None
    return triton_torch


def lstm_weights(weights: Any, dtype: str) -> Any:
    """As `reference.lstm_weights`; for half the bits as they are.

    `lstm` casts them itself. So they are still the parameters of which it
    chooses the layout, and gradients need no rounding where it gives float32.
    """
    if dtype in ("bfloat16", "float16"):
        return tuple(weights)
    return reference.lstm_weights(weights, dtype)


def jit_of_steps(asked: Any) -> Any:
    """As `reference.jit_of_steps`: torch.compile takes none of it apart."""
    if asked is not True:
        return asked
    explain_once(
        "torch: jit_compile=True changes nothing for a LanguageModel, whose "
        "step is made of kernels that torch.compile leaves as they are."
    )
    return False


def _in_torchs_order(weights: list[reference.Weights]) -> list[Any]:
    """The same gates in the same order, matrices transposed, two biases.

    A parameter is stored that way the first time, on a GPU all of them in
    the one block that cuDNN wants, so that no call has to copy it. Weights
    that are made for a call, by weight dropout, are copied into such a block.
    """
    flat = [tensor for layer in weights for tensor in layer]
    are_parameters = all(isinstance(t, torch.nn.Parameter) for t in flat)
    # What is stored for inference only could not be trained.
    if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
        _store_once_for_cudnn(weights)
        if not _is_for_cudnn(flat[0]):
            _store_transposed(flat)
    if not are_parameters and _is_for_cudnn(flat[0]):
        return _pack_for_cudnn(weights)
    return [
        tensor
        for kernel, recurrent, bias in weights
        for tensor in (
            kernel.T.contiguous(),
            recurrent.T.contiguous(),
            bias,
            getattr(bias, _SECOND_BIAS, torch.zeros_like(bias)),
        )
    ]


def _fill_a_block(weights: list[reference.Weights]) -> bool:
    """Whether these weights are alone in one block, as cuDNN wants them."""
    return len(
        {t.untyped_storage().data_ptr() for w in weights for t in w}
    ) == 1 and getattr(weights[0][2], _LAYERS_IN_BLOCK, None) == len(weights)


def _is_for_cudnn(tensor: Any) -> bool:
    acceptable: bool = torch.backends.cudnn.is_acceptable(tensor)
    return acceptable


@torch.no_grad()
def _store_transposed(tensors: list[Any]) -> None:
    for matrix in tensors:
        if (
            isinstance(matrix, torch.nn.Parameter)
            and matrix.ndim == 2
            and not matrix.T.is_contiguous()
        ):
            matrix.data = matrix.data.T.contiguous().T


def _pack_for_cudnn(weights: list[reference.Weights]) -> list[Any]:
    """Views of one block, which cuDNN takes as it is; gradients go through.

    In its order: the matrices of every layer, then for every layer the bias
    and zeros for the second bias that it has.
    """
    block = reference.pack_for_cudnn(weights)
    shapes = [m.T.shape for layer in weights for m in layer[:2]]
    shapes += [layer[2].shape for layer in weights for _ in range(2)]
    sizes = [shape.numel() for shape in shapes]
    parts = [
        part.view(shape)
        for part, shape in zip(block.split(sizes), shapes, strict=True)
    ]
    matrices, biases = parts[: 2 * len(weights)], parts[2 * len(weights) :]
    return [
        tensor
        for layer in range(len(weights))
        for group in (matrices, biases)
        for tensor in group[2 * layer : 2 * layer + 2]
    ]


def _store_once_for_cudnn(weights: list[reference.Weights]) -> None:
    """Stores parameters in a block of their own, if they are in none."""
    flat = [tensor for layer in weights for tensor in layer]
    if (
        all(isinstance(tensor, torch.nn.Parameter) for tensor in flat)
        and _is_for_cudnn(flat[0])
        and not _fill_a_block(weights)
    ):
        _store_for_cudnn(weights)


@torch.no_grad()
def _store_for_cudnn(weights: list[reference.Weights]) -> None:
    """As `torch.nn.LSTM.flatten_parameters` does."""
    block = [
        tensor
        for kernel, recurrent, bias in weights
        for tensor in (
            kernel.data.T.contiguous(),
            recurrent.data.T.contiguous(),
            bias.data.clone(),
            torch.zeros_like(bias.data),
        )
    ]
    torch._cudnn_rnn_flatten_weight(
        block,
        4,  # tensors a layer
        weights[0][0].shape[0],  # features
        2,  # an LSTM, among cuDNN's kinds
        weights[0][1].shape[0],  # units
        0,  # no projection
        len(weights),
        True,  # batch first
        False,  # one direction
    )
    for layer, (kernel, recurrent, bias) in enumerate(weights):
        stored = block[4 * layer : 4 * layer + 4]
        kernel.data, recurrent.data = stored[0].T, stored[1].T
        bias.data = stored[2]
        setattr(bias, _SECOND_BIAS, stored[3])
        setattr(bias, _LAYERS_IN_BLOCK, len(weights))


def _observe(function: Any, *arguments: Any, **options: Any) -> Any:
    """Calls an LSTM and notes which operation the dispatcher called for it.

    It is watched the first time for a device, a dtype and a form of data.
    """
    x = arguments[0]
    if _is_exporting():
        return function(*arguments, **options)
    if torch.compiler.is_compiling():
        return _call_as_it_is(function, *arguments, **options)
    key = (x.device.type, x.dtype, x.ndim, options["train"])
    if key in _observed:
        note_kernel(_observed[key])
        return function(*arguments, **options)
    with _Watch() as watch:
        outputs = function(*arguments, **options)
    fused = [_FUSED[name] for name in watch.names if name in _FUSED]
    _observed[key] = fused[0] if fused else "torch: loop over ATen's cell"
    note_kernel(_observed[key])
    return outputs


@torch.compiler.disable
def _call_as_it_is(function: Any, *arguments: Any, **options: Any) -> Any:
    """Calls what torch.compile cannot take apart: the kernels of LSTMs."""
    return function(*arguments, **options)


class _Watch(TorchDispatchMode):
    """Keeps the names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def linear_cross_entropy(
    features: Any,
    kernel: Any,
    bias: Any,
    targets: Any,
    weights: Any = None,
    *,
    max_logits_bytes: int | None = None,
) -> Any:
    """As `reference.linear_cross_entropy`, in chunks of the vocabulary."""
    shape = targets.shape
    targets = targets.reshape(-1).long()
    if weights is not None:
        weights = weights.float().reshape(-1)
        targets = targets.masked_fill(weights == 0, 0)
    features = features.reshape(-1, kernel.shape[0])
    if max_logits_bytes is None:
        max_logits_bytes = reference.default_logits_bytes(
            _device_memory(features.device)
        )
    size = reference.chunk_size(
        max(targets.numel(), 1), kernel.shape[1], max_logits_bytes
    )
    nll = _CrossEntropy.apply(features, kernel, bias, targets, size)
    if size < kernel.shape[1]:  # else PyTorch refuses it
        is_word = (targets >= 0) & (targets < kernel.shape[1])
        nll = nll.where(is_word, torch.nan)
    if weights is not None:
        nll = nll * weights
    return nll.reshape(shape)


def cross_entropy_of_some(
    features: Any,
    down: Any,
    kernel: Any,
    targets: Any,
    is_wanted: Any,
) -> Any:
    """As `reference.cross_entropy_of_some`, of as many as there are."""
    (places,) = is_wanted.reshape(-1).nonzero(as_tuple=True)
    features = features.reshape(-1, down.shape[0]).index_select(0, places)
    nll = linear_cross_entropy(
        features @ down,
        kernel,
        kernel.new_zeros(kernel.shape[1]),
        targets.reshape(-1).index_select(0, places),
    )
    all_nll = nll.new_zeros(targets.numel())
    return all_nll.index_copy(0, places, nll).reshape(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Any, kernel: Any, bias: Any, targets: Any, size: int
    ) -> Any:
        ctx.size = size
        lowest = torch.finfo(torch.float32).min  # -inf less itself is no number
        largest = torch.full_like(targets, lowest, dtype=torch.float32)
        largest = largest[:, None]
        total = torch.zeros_like(largest)
        chosen = torch.zeros_like(largest)
        for first in range(0, kernel.shape[1], size):
            logits = _logits(features, kernel, bias, first, size)
            places, is_here = _places(targets, first, logits.shape[1])
            chosen += logits.gather(1, places).where(is_here, 0.0)
            new_largest = torch.maximum(largest, logits.amax(1, keepdim=True))
            exponentials = logits.sub_(new_largest).exp_()
            total = total * (largest - new_largest).exp_()
            total += exponentials.sum(1, keepdim=True)
            largest = new_largest
        log_total = total.log() + largest
        # They reach the number of words: too much for float16.
        if size >= kernel.shape[1] and features.dtype != torch.float16:
            exponentials.scatter_add_(1, targets[:, None], -total)
            kept = (exponentials.to(features.dtype), total)
        else:
            kept = (None, log_total)
        ctx.save_for_backward(features, kernel, bias, targets, *kept)
        return (log_total - chosen)[:, 0]

    @staticmethod
    @once_differentiable(_CROSS_ENTROPY_ONCE)
    def backward(ctx: Any, saved: Any, upstream: Any) -> tuple[Any, ...]:
        features, kernel, bias, targets, exponentials, total = saved
        upstream = upstream[:, None]
        if exponentials is not None:
            upstream = upstream / total
            scaled = (features * upstream).to(features.dtype)
            d_features = _product(exponentials, kernel.T)
            d_kernel = _gradient(kernel, scaled, exponentials)
            d_bias = _product(upstream.T.to(exponentials.dtype), exponentials)
        else:
            scaled = (features * upstream).to(features.dtype)
            d_features = torch.zeros_like(features)
            d_kernel = torch.empty_like(kernel)
            d_bias = torch.empty_like(bias)[None]
            for first in range(0, kernel.shape[1], ctx.size):
                part = slice(first, first + ctx.size)
                errors = _logits(features, kernel, bias, first, ctx.size)
                errors.sub_(total).exp_()
                places, is_here = _places(targets, first, errors.shape[1])
                errors.scatter_add_(1, places, -is_here.float())
                errors = errors.to(features.dtype)
                d_features += _product(errors, kernel[:, part].T)
                d_kernel[:, part] = _gradient(kernel, scaled, errors)
                d_bias[:, part] = _product(upstream.T.to(errors.dtype), errors)
        d_features = (d_features * upstream).to(features.dtype)
        return d_features, d_kernel, d_bias[0].to(bias.dtype), None, None


def _logits(
    features: Any, kernel: Any, bias: Any, first: int, size: int
) -> Any:
    part = slice(first, first + size)
    return _product(features, kernel[:, part]).float().add_(bias[part])


def _places(targets: Any, first: int, width: int) -> tuple[Any, Any]:
    """Where in a chunk the targets are, and whether they are there at all."""
    places = (targets - first)[:, None]
    is_here = (places >= 0) & (places < width)
    return places.clamp(0, width - 1), is_here


def _gradient(kernel: Any, features: Any, errors: Any) -> Any:
    """`features.T @ errors`, laid out as the kernel, which may be tied."""
    if kernel.T.is_contiguous():
        if _MKL_IS_FASTER:  # in bfloat16 too, where it is oneDNN's matmul
            return (errors.T @ features).T
        return _product(errors.T, features).T
    return _product(features.T, errors)


def _multiplies_by_onednn(left: Any) -> bool:
    """Whether it has these numbers, no float64, and is the faster one."""
    if left.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if left.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(left.dtype == torch.float32) and not _MKL_IS_FASTER


def _product(left: Any, right: Any) -> Any:
    """A matrix product."""
    # oneDNN sums over no empty side.
    if _multiplies_by_onednn(left) and left.numel():
        # Of a matrix with gaps between its rows oneDNN takes minutes.
        if not (right.is_contiguous() or right.T.is_contiguous()):
            right = right.contiguous()
        return torch.ops.mkldnn._linear_pointwise(
            left, right.T, None, "none", [], ""
        )
    return left @ right


def fuse_optimizer(optimizer: Any) -> None:
    """As `reference.fuse_optimizer`, by PyTorch's fused kernels.

    Keras's SGD waits for the device at each step to read the learning rate,
    its Adam passes over the weights seven times. Here no number is read.
    """
    for kind, update in (("Adam", _update_adam), ("SGD", _update_sgd)):
        if reference.is_plain(optimizer, kind):
            # Keras's own place for what a backend does in another way.
            optimizer._backend_apply_gradients = partial(
                reference.update_plain, update, kind, optimizer
            )


@torch.no_grad()
def _update_adam(
    optimizer: Any, gradients: list[Any], variables: list[Any]
) -> None:
    places = [optimizer._get_variable_index(v) for v in variables]
    weights = [v.value for v in variables]
    gradients = _laid_out(gradients, weights)
    moments = []
    for of_all in (optimizer._momentums, optimizer._velocities):
        slots = [of_all[place].value for place in places]
        for slot, stored in zip(slots, _laid_out(slots, weights), strict=True):
            slot.data = stored.data
        moments.append(slots)
    step = optimizer.iterations.value.to(torch.float32) + 1
    # Keras corrects the rate for the zeros at the start, and not `v`, to
    # which epsilon is added: the kernel is told that the start is long ago.
    rate = _learning_rate(optimizer, gradients[0])
    rate = rate * torch.sqrt(1 - optimizer.beta_2**step)
    rate = rate / (1 - optimizer.beta_1**step)
    long_ago = torch.full_like(step, 1e9)
    torch._fused_adam_(
        weights,
        gradients,
        *moments,
        [],
        [long_ago] * len(gradients),
        lr=rate,
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        weight_decay=getattr(optimizer, "l2", 0.0),  # in the gradient
        eps=optimizer.epsilon,
        amsgrad=False,
        maximize=False,
        **_clipping(optimizer, gradients),
    )


@torch.no_grad()
def _update_sgd(
    optimizer: Any, gradients: list[Any], variables: list[Any]
) -> None:
    weights = [v.value for v in variables]
    gradients = _laid_out(gradients, weights)
    torch._fused_sgd_(
        weights,
        gradients,
        [],
        weight_decay=getattr(optimizer, "l2", 0.0),  # in the gradient
        momentum=0.0,
        lr=_learning_rate(optimizer, gradients[0]),
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        **_clipping(optimizer, gradients),
    )


def _laid_out(tensors: list[Any], weights: list[Any]) -> list[Any]:
    """Tensors in memory as the weights, through which the kernels walk."""
    return [
        tensor
        if tensor.stride() == weight.stride()
        else torch.empty_like(weight).copy_(tensor)
        for tensor, weight in zip(tensors, weights, strict=True)
    ]


def _learning_rate(optimizer: Any, like: Any) -> Any:
    rate = optimizer.learning_rate
    return torch.as_tensor(
        getattr(rate, "value", rate), dtype=torch.float32, device=like.device
    )


def _clipping(optimizer: Any, gradients: list[Any]) -> dict[str, Any]:
    """What the fused kernels divide gradients by as they read them."""
    if not optimizer.global_clipnorm:
        return {}
    # In float32, as the kernels read it, whatever the gradients are in.
    norm = _norm(gradients).float()
    scale = (norm / optimizer.global_clipnorm).clamp(min=1.0)
    return {
        # Of an infinite norm NaN, as Keras's.
        "grad_scale": scale + (norm - norm),
        "found_inf": torch.zeros_like(norm),
    }


def _norm(tensors: list[Any]) -> Any:
    """The norm of all numbers together.

    On a CPU PyTorch adds up all squares in float32, one after the other: of
    fifteen million, a few of them large, half a per cent is lost. Rows of a
    thousand lose nothing.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors)).norm()
    parts = []
    for tensor in tensors:
        is_turned = tensor.ndim == 2 and not tensor.is_contiguous()
        flat = (tensor.T if is_turned else tensor).reshape(-1)
        whole = len(flat) - len(flat) % 1024
        rows = flat[:whole].view(-1, 1024)
        dtype = torch.promote_types(flat.dtype, torch.float32)
        parts += [torch.linalg.vector_norm(rows, dim=1, dtype=dtype)]
        parts += [flat[whole:]]
    return torch.cat([part.double() for part in parts]).norm()


def has_gpu() -> bool:
    """As `reference.has_gpu`."""
    # Keras can be told to leave a GPU alone.
    return torch.cuda.is_available() and bool(keras.ops.zeros(()).is_cuda)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """As `reference.tf32`."""
    if not has_gpu():
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


def device_name() -> str:
    """The name of the device that PyTorch computes on."""
    if has_gpu():
        return str(torch.cuda.get_device_name())
    return reference.device_name()


def _device_memory(device: Any) -> int | None:
    """Bytes of the GPU's memory, where the tensors are on one."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
