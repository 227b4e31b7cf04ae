"""Times training steps in this process; a driver at a pipe's other end asks.

A process holds one framework, and of the ways to train with it those that it
was asked to build. `python -m multilstm.benchmark` answers the questions that
`workers.WorkerProcess` asks: JSON lines that name a method of `Worker` and its
arguments.

Ways to train a language model of a given shape, from the same weights on the
same batches:

    ours             multilstm.LanguageModel under `fit`
    stock_tutorial   the classic tutorial's layers in stock Keras: softmax
                     and accuracy over all words (targets are ids already)
    stock_competent  stock Keras as its guides advise: logits, no metric
    our_layer        the same with `multilstm.layers.LSTM` in it
    native           the framework's own loop, no Keras (`native_loops.py`)
    native_compiled  the same under torch.compile, or under XLA; on JAX the
                     cuDNN LSTM

Ways to train somebody's own Keras model, on random numbers:

    as_it_is         as the file has it
    accelerated      after `multilstm.accelerate`
"""

import contextlib
import dataclasses
import gc
import json
import math
import os
import queue
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multilstm import devices, native_loops
from multilstm.errors import UserError
from multilstm.selection import installed_versions

KERAS_VARIANTS = ("ours", "our_layer", "stock_tutorial", "stock_competent")
CHECK_STEPS = 5
PRODUCT_SECONDS = 0.2  # of plain products each time
TRIAL_SIZE = (20, 30, 500)  # batch, time, units, and as many features
MODEL_FILE_LIMIT = 4 * 10**9  # bytes
MODEL_DATA_LIMIT = 1 << 28  # bytes of inputs and targets, 256 MiB


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a network and of its batches."""

    name: str
    units: Sequence[int]
    embedding_dim: int
    batch_size: int
    sequence_length: int
    vocabulary_size: int = 10_000
    tied: bool = False

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def step_flops(self) -> int:
        """Of all products; the backward pass has two for each forward."""
        forward, features = 0, self.embedding_dim
        for units in self.units:
            forward += 2 * self.tokens * (features + units) * 4 * units
            features = units
        return 3 * (forward + 2 * self.tokens * features * self.vocabulary_size)

    def __str__(self) -> str:
        if not self.units:  # somebody's own model
            return (
                f"{self.name}: batch {self.batch_size}, length "
                f"{self.sequence_length}"
            )
        return (
            f"{self.name}: LSTM {'+'.join(map(str, self.units))}, embedding "
            f"{self.embedding_dim}{' tied' * self.tied}, batch "
            f"{self.batch_size}, length {self.sequence_length}, vocabulary "
            f"{self.vocabulary_size:,}"
        )


class WorkerError(Exception):
    """What a worker could not do, in one line."""


def our_model(shape: Shape) -> Any:
    import keras

    from multilstm import LanguageModel

    model = LanguageModel(
        shape.vocabulary_size,
        units=shape.units,
        embedding_dim=shape.embedding_dim,
        tied_embeddings=shape.tied,
    )
    model.build((shape.batch_size, shape.sequence_length))
    model.compile(keras.optimizers.Adam(1e-3))
    return model


def stock_model(shape: Shape, *, variant: str) -> Any:
    import keras
    from keras import layers

    as_tutorial = variant == "stock_tutorial"
    lstm = layers.LSTM
    if variant == "our_layer":
        from multilstm.layers import LSTM

        lstm = LSTM
    embedding = layers.Embedding(shape.vocabulary_size, shape.embedding_dim)
    projection = layers.Dense(shape.vocabulary_size)
    if shape.tied:
        projection = tied_projection(embedding)
    if as_tutorial:
        projection = layers.TimeDistributed(projection)
    model = keras.Sequential(
        [
            layers.Input((shape.sequence_length,), dtype="int32"),
            embedding,
            *(lstm(units, return_sequences=True) for units in shape.units),
            projection,
            *([layers.Activation("softmax")] if as_tutorial else []),
        ]
    )
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=not as_tutorial),
        metrics=["accuracy"] if as_tutorial else None,
    )
    return model


def tied_projection(embedding: Any) -> Any:
    import keras

    class TiedProjection(keras.layers.Layer):
        def build(self, features_shape: tuple[int, ...]) -> None:
            self.bias = self.add_weight(shape=(embedding.input_dim,))

        def call(self, features: Any) -> Any:
            table = keras.ops.cast(embedding.embeddings, self.compute_dtype)
            kernel = keras.ops.transpose(table)
            return keras.ops.matmul(features, kernel) + self.bias

        def compute_output_shape(
            self, features_shape: tuple[int, ...]
        ) -> tuple[int, ...]:
            return (*features_shape[:-1], embedding.input_dim)

    return TiedProjection()


def keras_loop(
    shape: Shape, variant: str, weights: list[Any]
) -> tuple[str, Any]:
    """As `native_loop`; the loss is a mean over the batches."""
    import keras

    if variant == "ours":
        model = our_model(shape)
    else:
        model = stock_model(shape, variant=variant)
    model.set_weights(weights)

    def train(window: Any) -> float:
        history = model.fit(window, shuffle=False, verbose=0)
        keras.ops.convert_to_numpy(model.trainable_variables[-1])  # waits
        return float(history.history["loss"][-1])

    return "keras.layers.LSTM", train


def our_kernel() -> str:
    """The implementation that ran last."""
    from multilstm import ops

    return str(ops.last_kernel())


class Worker:
    """The framework of this process, and the variants that it holds.

    What `ask` can be asked for are the methods. They take and give what JSON
    can hold, so that it may as well be asked through a pipe.
    """

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        gc.collect()
        try:
            answer: dict[str, Any] = getattr(self, method)(**arguments)
            return answer
        except (native_loops.AbsentError, ImportError, UserError) as error:
            raise WorkerError(str(error)) from error
        except Exception as error:
            traceback.print_exc()
            line = next(iter(str(error).strip().splitlines()), "")
            reason = f"{type(error).__name__}: {line}"[:160]
            raise WorkerError(reason) from error

    def versions(self, backend: str) -> dict[str, Any]:
        """`installed_versions` here; the framework is not imported."""
        return {"versions": installed_versions(backend)}

    def start(self, precision: str) -> dict[str, Any]:
        """Imports the framework; says what it is and on what it runs."""
        # Several frameworks may share one GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import keras

        from multilstm import ops

        self.precision = precision
        self.backend = keras.config.backend()
        defaults = native_loops.describe_precision(self.backend)
        # For as long as the process lives.
        self.tf32 = contextlib.ExitStack()
        self.tf32.enter_context(ops.tf32(precision != "float32"))
        self.dtype = "bfloat16" if precision == "bfloat16" else "float32"
        return {
            "device": ops.device_name(),
            "gpu": ops.has_gpu(),
            "devices": native_loops.list_devices(self.backend),
            "libraries": native_loops.list_libraries(self.backend),
            "precision_defaults": defaults,
            "versions": installed_versions(self.backend),
            "product_error": self.product_error(),
        }

    def tensors(self, *arrays: np.ndarray) -> list[Any]:
        from keras import ops

        return [ops.convert_to_tensor(array, self.dtype) for array in arrays]

    def product_error(self) -> float:
        """Of a product of 1024 rows: the proof of the precision in use."""
        from keras import ops

        a, b = normal((1024, 1024), (1024, 1024))
        product = ops.cast(ops.matmul(*self.tensors(a, b)), "float32")
        exact = a.astype(np.float64) @ b.astype(np.float64)
        error = ops.convert_to_numpy(product) - exact
        return float(np.linalg.norm(error) / np.linalg.norm(exact))

    def prepare(self, steps: int, **sizes: Any) -> dict[str, Any]:
        """Forgets the variants and makes data and weights for others."""
        import keras

        from multilstm import NextWordWindows

        self.loops: dict[str, Any] = {}
        self.product: Any = None
        keras.utils.clear_session(free_memory=True)  # and the dtype policy
        forget_peak(self.backend)
        if self.dtype == "bfloat16":
            keras.config.set_dtype_policy("mixed_bfloat16")
        self.model_file: Any = None
        self.sizes = shape = Shape(**sizes)
        self.weights = native_loops.draw_weights(shape)
        token_ids = native_loops.draw_token_ids(shape, steps)
        self.window_of_one: Any
        self.window: Any
        self.window_of_one, self.window = (
            NextWordWindows(ids, shape.sequence_length, shape.batch_size)
            for ids in (token_ids[: shape.tokens + 1], token_ids)
        )
        return {}

    def prepare_model(
        self, path: str, steps: int, batch_size: int, sequence_length: int
    ) -> dict[str, Any]:
        """Loads somebody's model and draws batches for it.

        Returns:
            `steps_in_a_row`: the second size of its first input, or 1.
            `is_random`: whether a layer draws numbers in training, others on
            each backend, so that losses after a step are not comparable.
        """
        import keras

        self.loops, self.product = {}, None
        keras.utils.clear_session(free_memory=True)
        forget_peak(self.backend)
        self.model_file = load_model(Path(path))
        one = draw_batches(self.model_file, batch_size, sequence_length)
        size = sum(array.nbytes for array in keras.tree.flatten(one))
        self.batch_size = batch_size
        self.window_of_one = one
        if steps * size <= MODEL_DATA_LIMIT:
            self.window = draw_batches(
                self.model_file, steps * batch_size, sequence_length
            )
        else:
            self.window = same_batch(one, steps)
        first = keras.tree.flatten(one)[0]
        return {
            "steps_in_a_row": first.shape[1] if first.ndim > 1 else 1,
            "is_random": any(
                getattr(layer, name, None)
                for layer in self.model_file._flatten_layers()
                for name in ("rate", "dropout", "recurrent_dropout", "stddev")
            ),
        }

    def make(self, variant: str) -> tuple[str, Any]:
        """The name of a variant's LSTM, and `train(window) -> loss`."""
        if self.model_file is not None:
            return model_loop(self.model_file, variant, self.batch_size)
        if variant in KERAS_VARIANTS:
            import keras

            assert keras.config.dtype_policy().compute_dtype == self.dtype
            return keras_loop(self.sizes, variant, self.weights)
        kernel, train = native_loops.native_loop(
            self.backend,
            self.sizes,
            self.weights,
            precision=self.precision,
            compiled=variant == "native_compiled",
        )
        return kernel, lambda window: train(
            map(window.__getitem__, range(len(window)))
        )

    def build(self, variant: str) -> dict[str, Any]:
        """Makes a variant, checks its losses and warms it up."""
        began = time.perf_counter()
        kernel, train = self.make(variant)
        losses = [train(self.window_of_one)]
        compiled = time.perf_counter()
        # The loss is that before a step: one more gives the last step's.
        losses += [train(self.window_of_one) for _ in range(CHECK_STEPS)]
        checked = time.perf_counter()
        train(self.window)
        self.loops[variant] = train
        is_ours = variant in ("ours", "our_layer", "accelerated")
        return {
            "kernel": our_kernel() if is_ours else kernel,
            "losses": losses,
            "compile_time_seconds": round(compiled - began, 3),
            "warm_up_seconds": round(time.perf_counter() - checked, 3),
        }

    def time_window(self, variant: str) -> dict[str, Any]:
        from multilstm import ops

        has_gpu = ops.has_gpu()
        joules_before = devices.gpu_joules() if has_gpu else None
        began = time.perf_counter()
        self.loops[variant](self.window)
        seconds = time.perf_counter() - began
        joules_after = devices.gpu_joules() if has_gpu else None
        joules = None
        if joules_after is not None and joules_before is not None:
            joules = joules_after - joules_before
        return {"seconds": seconds, "joules": joules}

    def diagnose(self) -> dict[str, Any]:
        """Trains one LSTM layer for a second, ours and the reference's.

        Returns:
            `kernel`: What ran. `step_ms` and `reference_step_ms`: Of a
            training step of the layer, the fastest of five, taken in turns.
            `output_error` and `gradient_error`: Largest difference from the
            reference, relative to its largest number. `notes`: What ours said
            of itself.
        """
        from multilstm import layers
        from multilstm.ops.evidence import explanations

        units = TRIAL_SIZE[-1]
        x, target = normal(TRIAL_SIZE, TRIAL_SIZE)
        weights = [
            array / (2 * len(array)) ** 0.5
            for array in normal(
                (units, 4 * units), (units, 4 * units), (4 * units,)
            )
        ]
        models, found = {}, {}
        for name in ("ours", "reference"):
            layer = (
                layers.LSTM(units, return_sequences=True)
                if name == "ours"
                else reference_layer(units)
            )
            model = trial_model(layer, weights)
            output = np.asarray(model.predict_on_batch(x))
            model.train_on_batch(x, target)
            after = model.get_weights()
            if name == "ours":
                kernel = our_kernel()
            changes = [a - b for a, b in zip(after, weights, strict=True)]
            models[name], found[name] = model, (output, changes)
        step_ms = dict.fromkeys(models, math.inf)
        for _ in range(5):
            for name, model in models.items():
                began = time.perf_counter()
                model.train_on_batch(x, target)  # waits for the loss
                ms = 1000 * (time.perf_counter() - began)
                step_ms[name] = min(ms, step_ms[name])
        output, changes = found["ours"]
        truth, true_changes = found["reference"]
        return {
            "kernel": kernel,
            "notes": explanations(),
            "step_ms": round(step_ms["ours"], 3),
            "reference_step_ms": round(step_ms["reference"], 3),
            "output_error": relative_error(output, truth),
            "gradient_error": float(
                np.max(list(map(relative_error, changes, true_changes)))
            ),
        }

    def peak_memory(self) -> dict[str, Any]:
        """The most memory of this process for a shape, framework and all."""
        gpu_bytes = native_loops.gpu_peak_bytes(self.backend)
        return {
            "peak_memory_mb": devices.peak_memory_mb(),
            "peak_device_memory_mb": gpu_bytes and round(gpu_bytes / 1e6, 1),
        }

    def time_product(self) -> dict[str, Any]:
        """GFLOP/s of the largest product of a step, alone."""
        from keras import ops

        units, words = self.sizes.units[-1], self.sizes.vocabulary_size
        if self.product is None:
            sizes = (self.sizes.tokens, units), (units, words)
            self.product = self.tensors(*normal(*sizes))

        def seconds(repetitions: int) -> float:
            began = time.perf_counter()
            for _ in range(repetitions):
                product = ops.matmul(*self.product)
            ops.convert_to_numpy(ops.cast(product[:1], "float32"))  # waits
            return time.perf_counter() - began

        seconds(2)  # compiles
        repetitions = max(3, int(PRODUCT_SECONDS / seconds(1)))
        flops = 2 * self.sizes.tokens * units * words * repetitions
        return {self.backend: flops / seconds(repetitions) / 1e9}

    def measure_memory(self, variant: str) -> dict[str, Any]:
        """Of one window in a process that has done nothing else."""
        before = devices.memory_mb()
        _, train = self.make(variant)
        train(self.window)
        gpu_bytes = native_loops.gpu_peak_bytes(self.backend)
        peak = devices.peak_memory_mb()
        return {
            "peak_mb": peak,
            "peak_over_start_mb": round(peak - before, 1),
            "gpu_peak_mb": gpu_bytes and round(gpu_bytes / 1e6, 1),
        }


def trial_model(lstm: Any, weights: Sequence[np.ndarray]) -> Any:
    """A model of one LSTM layer with these weights, to be trained."""
    import keras

    model = keras.Sequential([keras.Input(TRIAL_SIZE[1:]), lstm])
    model.set_weights(weights)
    # The loss is a mean over many numbers: a step that moves the weights.
    model.compile(keras.optimizers.SGD(1e4), "mse")
    return model


def reference_layer(units: int) -> Any:
    """An LSTM layer by `ops.reference`, the oracle of all others."""
    import keras

    from multilstm.ops import reference

    class ReferenceLSTM(keras.layers.Layer):
        def build(self, shape: tuple[int, ...]) -> None:
            self.weights_of_lstm = [
                self.add_weight(shape=size)
                for size in (
                    (shape[-1], 4 * units),
                    (units, 4 * units),
                    (4 * units,),
                )
            ]

        def call(self, x: Any) -> Any:
            zeros = keras.ops.zeros((keras.ops.shape(x)[0], units), x.dtype)
            weights = map(keras.ops.convert_to_tensor, self.weights_of_lstm)
            return reference.lstm(x, zeros, zeros, *weights)[0]

        def compute_output_shape(
            self, shape: tuple[int, ...]
        ) -> tuple[int, ...]:
            return (*shape[:2], units)

    return ReferenceLSTM()


def model_loop(model: Any, variant: str, batch_size: int) -> tuple[str, Any]:
    """As `keras_loop`, for a model of one's own on batches of its own."""
    import keras

    if variant == "accelerated":
        from multilstm import accelerate

        model = accelerate(model)
    model.compile(keras.optimizers.Adam(1e-3), "mse")

    def train(window: Any) -> float:
        if isinstance(window, keras.utils.PyDataset):
            history = model.fit(window, shuffle=False, verbose=0)
        else:
            history = model.fit(
                *window, batch_size=batch_size, shuffle=False, verbose=0
            )
        keras.ops.convert_to_numpy(model.trainable_variables[-1])  # waits
        return float(history.history["loss"][-1])

    return "as the file has it", train


def load_model(path: Path) -> Any:
    """Loads a `.keras` file without letting it run code of its own.

    Raises:
        UserError: If there is no such file, it is of another kind, too large
            or broken, or needs code that is not in Keras or here.
    """
    import keras

    from multilstm import layers, model  # noqa: F401  (Keras knows them then)

    if path.suffix != ".keras" or not path.is_file():
        raise UserError(
            f"--model needs a file MODEL.keras, as model.save() writes it; "
            f"received {path}."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MODEL_FILE_LIMIT:
            raise UserError(
                f"{path} holds {size:,} bytes; at most {MODEL_FILE_LIMIT:,} "
                "are read. Benchmark a smaller model of the same kind."
            )
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        MemoryError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise UserError(
            f"{path} cannot be loaded: {reason[:300]} Models with Lambda "
            "layers or classes of your own are refused: they could run "
            "anything."
        ) from error


def draw_batches(model: Any, rows: int, sequence_length: int) -> Any:
    """Random inputs as a model declares them, and random targets.

    Where an `Embedding` takes an input they are word ids, whatever it
    declares: Keras declares float32 for a `Sequential` that begins with one.
    """
    import keras

    if not getattr(model, "inputs", None):
        raise UserError(
            "--model needs a functional or sequential model, which declares "
            "its inputs; this one does not. Save it with a keras.Input."
        )
    rng = np.random.default_rng(4)
    embeddings = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Embedding)
    ]
    inputs: dict[str, Any] = {}
    for tensor in model.inputs:
        size = [rows, *(side or sequence_length for side in tensor.shape[1:])]
        words = [
            layer.input_dim
            for layer in embeddings
            if getattr(layer, "input", None) is tensor
        ]
        if words or "int" in str(tensor.dtype):
            words = words or [layer.input_dim for layer in embeddings]
            drawn = rng.integers(min(words, default=2), size=size)
            inputs[tensor.name] = drawn.astype(np.int32)
        else:
            inputs[tensor.name] = rng.standard_normal(size, np.float32)
    given = inputs if len(inputs) > 1 else next(iter(inputs.values()))
    one_row = keras.tree.map_structure(lambda array: array[:1], given)
    targets = keras.tree.map_structure(
        lambda output: rng.standard_normal(
            (rows, *output.shape[1:]), np.float32
        ),
        model(one_row),
    )
    return given, targets


def same_batch(batch: Any, steps: int) -> Any:
    """A dataset of one batch, which comes so many times."""
    import keras

    class SameBatch(keras.utils.PyDataset):
        def __len__(self) -> int:
            return steps

        def __getitem__(self, index: int) -> Any:
            return batch

    return SameBatch()


def relative_error(array: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference over the largest number."""
    return float(np.abs(array - truth).max() / np.abs(truth).max())


def normal(*sizes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.standard_normal(size, np.float32) for size in sizes]


def forget_peak(backend: str) -> None:
    """Lets the peaks of memory begin anew: of the process on Linux, of a GPU.

    JAX cannot: there the peak is that of the largest shape so far.
    """
    native_loops.forget_gpu_peak(backend)
    references = Path("/proc/self/clear_refs")
    if references.exists():
        references.write_text("5")


def _questions() -> Iterator[str]:
    """The lines of stdin; where it ends this process does, busy or not.

    Whoever asked is gone then, and may have been killed.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def serve() -> None:
    """Answers the questions on stdin; all else that is printed is stderr's."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in _questions():
        method, arguments = json.loads(line)
        try:
            answer = worker.ask(method, **arguments)
        except WorkerError as failure:
            answer = {"failure": str(failure)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
