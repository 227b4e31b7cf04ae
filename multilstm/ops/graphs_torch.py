"""PyTorch on a GPU: a training step is recorded once, then replayed.

A step of a small batch is hundreds of kernels, each done sooner than Python
starts the next one. A CUDA graph holds them all and is started at once. What
is recorded is Keras's own `train_step`, of which two things come from the host
and would be the same at every replay: Python's numbers, which are constants
and become fills, and the seeds of dropout. Masks are drawn by a generator of
the graph's instead, which each replay finds seeded with the step's number.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from multilstm.ops import reference
from multilstm.ops.evidence import explain_once
from multilstm.ops.torch import has_gpu, is_recorded

_MOST_GRAPHS = 128  # one for each shape of batches

# Of the step that is running, where it draws its masks from one.
_generator: ContextVar[Any] = ContextVar("generator", default=None)


def dropout(inputs: Any, rate: float, noise_shape: Any, seed: Any) -> Any:
    """As `reference.dropout`; from the step's generator, where it has one.

    On the CPU NumPy draws large masks: PyTorch's own generator takes seven
    times as long. Those that rows or steps share are small, and Keras's, so
    that `accelerate` goes on with the masks of the model that it was given.
    """
    generator = _generator.get()
    is_numpys = (
        noise_shape is None
        and inputs.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )
    if generator is None and not is_numpys:
        return reference.dropout(inputs, rate, noise_shape, seed)
    shape = [
        whole if part is None else part
        for whole, part in zip(
            inputs.shape, noise_shape or inputs.shape, strict=True
        )
    ]
    if generator is None:
        # As Keras does it, of a seed that is negative the lower bits.
        seeds = [int(number) & 0xFFFFFFFF for number in seed.next()]
        numbers = np.random.default_rng(seeds)
        is_kept = numbers.random(shape, dtype=np.float32) >= rate
        mask = torch.from_numpy(is_kept).to(inputs.dtype)
    else:
        mask = torch.empty(shape, dtype=inputs.dtype, device=inputs.device)
        mask.bernoulli_(1 - rate, generator=generator)
    return inputs * mask * (1 / (1 - rate) if rate < 1 else 0.0)


def steps_per_dispatch(flops: float) -> int:
    """As `reference.steps_per_dispatch`."""
    return reference.steps_in_a_dispatch(flops, on_cpu=not has_gpu())


def starts_singly(model: Any) -> bool:
    """As `parallel.starts_singly`: all but what can be recorded.

    The others ask the host in each step: how many of the words are rare, or
    whether a momentum is in use. To fail at that within a recording leaves
    PyTorch's allocator as if the recording went on.
    """
    is_plain = any(
        reference.is_plain(model.optimizer, kind) for kind in ("Adam", "SGD")
    )
    return not (
        has_gpu()
        and is_plain
        and model.loss_is_fused
        and model.keeps_methods("train_step")
        and model.settings["softmax"] == "exact"
        and not (model.run_eagerly or model.jit_compile)
        and not torch.distributed.is_initialized()
    )


def make_train_function(model: Any) -> Any:
    """As `reference.make_train_function`: on a GPU, replays of a recording."""
    return None if starts_singly(model) else RecordedSteps(model)


def make_test_function(model: Any) -> Any:
    """As `reference.make_test_function`; Keras's takes the first batch."""
    if model.steps_per_execution == 1:
        return None

    @torch.no_grad()
    def test_function(batches: list[Any]) -> Any:
        return [model.test_step(batch) for batch in batches][-1]

    return test_function


class RecordedSteps:
    """Trains on batches: the first of a shape eagerly, then by a recording.

    Args:
        model: A compiled `LanguageModel`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text = model.text  # which recordings read, so that it stays
        device = model.metrics_variables[0].value.device
        self.generator = torch.Generator(device)
        self.is_refused = False
        self.step, self.version = 0, -1
        self.fixed: Any = None
        self.pool: Any = None  # of memory, for all graphs
        self._forget()

    def __call__(self, batches: list[Any]) -> Any:
        """Takes a step for each batch; gives the metrics after the last."""
        fixed = self._fixed()
        if fixed != self.fixed:
            self._forget()
        iterations = self.model.optimizer.iterations.value
        if iterations._version != self.version:  # set by others
            self.step = int(iterations)  # waits for the device
        is_replayed = True
        for batch in batches:
            self.generator.manual_seed(self.model.step_seed + self.step)
            is_replayed &= self._step(batch)
            self.step += 1
        # Only a step of Python's moves a variable.
        self.fixed = fixed if is_replayed else self._fixed()
        self.version = iterations._version
        return self.model.get_metrics_result()

    def _step(self, batch: Any) -> bool:
        """Takes a step; whether by a replay."""
        leaves = _arrays_in(batch)
        key = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
        if key in self.shapes_seen and key not in self.graphs:
            self._record(key, batch)
        self.shapes_seen.add(key)
        if key not in self.graphs:
            fixed = self._fixed() if self.graphs else None
            self._train(batch)
            if self.graphs and self._fixed() != fixed:
                self._forget()  # what graphs read is elsewhere now
            return False
        inputs, graph = self.graphs[key]
        for place, leaf in zip(inputs, leaves, strict=True):
            place.copy_(_tensor(leaf))
        graph.replay()
        return True

    def _train(self, batch: Any) -> None:
        token = _generator.set(self.generator)
        # By the same kernels in a step before the recording as in that.
        recorded_token = is_recorded.set(not self.is_refused)
        try:
            self.model.train_step(batch)
        finally:
            is_recorded.reset(recorded_token)
            _generator.reset(token)

    def _record(self, key: Any, batch: Any) -> None:
        """Makes the graph of a step; the step itself is not done by that."""
        if self.is_refused or len(self.graphs) >= _MOST_GRAPHS:
            return
        device = self.generator.device
        inputs = keras.tree.map_structure(
            lambda leaf: (
                None if leaf is None else _tensor(leaf, copy_to=device)
            ),
            batch,
        )
        try:
            graph = self._capture(lambda: self._train(inputs))
        except RuntimeError as error:
            self.is_refused = True
            # This one may wait for the recording to go on.
            seed = self.generator.initial_seed()
            self.generator = torch.Generator(device).manual_seed(seed)
            explain_once(
                "torch: the training step cannot be recorded as a CUDA graph, "
                "so its kernels are started one by one: "
                f"{str(error).strip().splitlines()[0]}"
            )
            return
        self.graphs[key] = _arrays_in(inputs), graph

    def _capture(self, step: Callable[[], None]) -> Any:
        """What `replay()` of takes this step; Python runs it only now."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        with (
            torch.cuda.graph(
                graph, pool=self.pool, capture_error_mode="thread_local"
            ),
            Constants(),
        ):
            step()
        return graph

    def _fixed(self) -> Any:
        """What a recording has in it: where variables are, and precisions."""
        variables = (*self.model.variables, *self.model.optimizer.variables)
        return (
            [(v.value.data_ptr(), v.trainable) for v in variables],
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
        )

    def _forget(self) -> None:
        """Begins anew, as when variables have moved."""
        self.graphs: dict[Any, tuple[list[Any], Any]] = {}
        self.shapes_seen: set[Any] = set()
        self.pool = None


def _tensor(leaf: Any, *, copy_to: Any = None) -> Any:
    # An array that nobody may write to has to be copied.
    tensor = leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf)
    return tensor if copy_to is None else tensor.to(copy_to, copy=True)


def _arrays_in(batch: Any) -> list[Any]:
    """Without the None that stands for no weights."""
    return [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]


class Constants(TorchFunctionMode):
    """Lets Python's numbers become tensors by a fill, not by a transfer."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            function is torch.as_tensor
            and args
            and isinstance(args[0], (bool, int, float))
        ):
            return torch.full((), args[0], **kwargs)
        return function(*args, **kwargs)
