"""What Keras lacks: an LSTM with a state that lasts, a lookup that clips right.

Keras's own `stateful=True` does nothing on JAX and fails on PyTorch. Here the
state is a pair of tracked variables: every backend carries it from batch to
batch under `fit` and `evaluate`.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from multilstm.errors import UserError, check_whole
from multilstm.ops import (
    check_rows,
    dropout,
    embedding_lookup,
    explain_once,
    has_xla,
    lstm,
    lstm_stack,
    lstm_weights,
    on_host,
)

State = tuple[Any, Any]

# What `keras.layers.LSTM` takes besides, and what to do instead. The values
# that change nothing are taken, so that its `get_config()` builds ours.
_INSTEAD = {
    "stateful": "carry the state with carry_state=True",
    "recurrent_dropout": "no fast kernel has it: use dropout",
    "unroll": "leave it out, the loop is the backend's matter",
    "use_cudnn": "leave it out, the fastest kernel there is runs",
    "zero_output_for_mask": "leave it out, masked steps repeat the output",
}

# Whose tanh is the tanh.
_HAVE_ACTIVATIONS = ("builtins", "keras", "jax", "torch", "tensorflow")


@keras.saving.register_keras_serializable(package="multilstm")
class LSTM(keras.layers.Layer):
    """A drop-in for `keras.layers.LSTM`, on the implementation in `ops`.

    Takes Keras's arguments and weights (`get_weights` of either fits
    `set_weights` of the other), also `keras.layers.LSTM(...).get_config()` by
    `from_config`. Adds `carry_state`, which works on every backend. The
    activations are the LSTM's own, tanh and sigmoid, for which alone fast
    kernels exist.

    Args:
        units: Size of the hidden state and of the cell state.
        activation: `"tanh"`, taken for the sake of Keras's signature.
        recurrent_activation: `"sigmoid"`, likewise.
        use_bias: Whether the gates have biases.
        kernel_initializer: For the input projection.
        recurrent_initializer: For the recurrent projection.
        bias_initializer: For the biases.
        unit_forget_bias: Whether the forget gate's biases start at 1
            (Jozefowicz et al., 2015) instead of as `bias_initializer` says.
        kernel_regularizer: For the input projection.
        recurrent_regularizer: For the recurrent projection.
        bias_regularizer: For the biases.
        kernel_constraint: For the input projection.
        recurrent_constraint: For the recurrent projection.
        bias_constraint: For the biases.
        dropout: Share of the inputs to drop, in 0..1, one mask for all time
            steps (locked dropout).
        weight_dropout: Share of the recurrent kernel's weights to drop, in
            0..1, one mask for a whole batch (DropConnect; Wan et al., 2013,
            as Merity et al., 2018, section 2, use it). The kernels that run
            are the same: they are given other weights.
        return_sequences: Whether to return the outputs of all time steps.
        return_state: Whether to return the final states after the output.
        go_backwards: Whether to read the sequence from its end; the outputs
            then come in that order.
        carry_state: Whether each batch starts from the state in which the
            batch before ended, row by row. Needs a fixed batch size.
            `reset_state()` or the callback `ResetCarriedState` returns to
            zeros.
        seed: For the dropout masks.
        **kwargs: Of `keras.layers.Layer`: `name`, `dtype`, `trainable`.

    Call arguments:
        sequences: Tensor of shape `(batch, time, features)`.
        initial_state: `(h, c)`, each of shape `(batch, units)`, or of one row
            for all. Default: the carried state where it is carried, otherwise
            zeros. An explicit state leaves the carried one alone.
        mask: Bool tensor of shape `(batch, time)` (`(batch, time, 1)` and one
            row for all will do); a step that is False leaves the state and
            repeats the output, as with Keras's layer. (Where steps are masked
            before the first and the initial state is not zero, Keras's output
            is h on JAX, as here, and zero on others.)
        training: Whether dropout is applied.

    Output shape:
        `(batch, units)`, or `(batch, time, units)` with `return_sequences`;
        with `return_state` a tuple of that, h and c.

    Raises:
        UserError: For states or masks of another shape, and arguments that
            no fast kernel has.

    Gradients are taken backwards: JAX's forward mode (`jax.jvp`) does not go
    through, nor do PyTorch's (`torch.autograd.forward_ad`) and its
    `torch.func.vmap` of the layer itself. `keras.layers.LSTM` has them.

    Reference:
        Hochreiter and Schmidhuber, 1997, "Long short-term memory".

    Example:
    >>> layer = LSTM(4, return_sequences=True)
    >>> tuple(layer(np.zeros((2, 3, 5), "float32")).shape)
    (2, 3, 4)
    >>> [w.shape for w in layer.get_weights()]
    [(5, 16), (4, 16), (16,)]
    """

    stateful, states = False, None  # for Keras's wrappers, which ask

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        *,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        carry_state: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, instead in _INSTEAD.items():
            value = kwargs.pop(name, None)
            if name == "use_cudnn" and value is False:
                explain_once(
                    "`use_cudnn=False` changes nothing here: on a GPU the "
                    "fastest kernel runs, cuDNN's or another that gives the "
                    "same to rounding."
                )
            if value not in (None, False, 0, "auto"):
                raise UserError(
                    f"`{name}` is not an argument of this LSTM; received "
                    f"{value!r}. Instead {instead}, or use keras.layers.LSTM."
                )
        kwargs.pop("implementation", None)  # as Keras's, which has but one
        super().__init__(**kwargs)
        self.input_spec = keras.layers.InputSpec(ndim=3)
        _check_activation("activation", activation, "tanh")
        _check_activation(
            "recurrent_activation", recurrent_activation, "sigmoid"
        )
        # Read by Keras where it is to decide itself whether to use XLA.
        self.supports_jit = has_xla()
        self.units = check_whole("units", units, 1)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.recurrent_initializer = keras.initializers.get(
            recurrent_initializer
        )
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.unit_forget_bias = unit_forget_bias
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.recurrent_regularizer = keras.regularizers.get(
            recurrent_regularizer
        )
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.recurrent_constraint = keras.constraints.get(recurrent_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.return_sequences = return_sequences
        self.return_state = return_state
        self.go_backwards = go_backwards
        self.carry_state = carry_state
        self.seed = seed
        self.dropout = dropout
        self.input_dropout = Dropout(
            dropout,
            noise_shape=(None, 1, None),
            seed=seed,
            dtype=self.dtype_policy,
        )
        self.weight_dropout = weight_dropout
        self.weight_drop = Dropout(
            weight_dropout,
            # Of one seed both masks would be the same.
            seed=seed + 1 if seed is not None and dropout else seed,
            dtype=self.dtype_policy,
        )
        self.carried: _CarriedState | None = None
        if carry_state:
            wide = "float64" if self.compute_dtype == "float64" else "float32"
            self.carried = _CarriedState(name="carried", dtype=wide)

    def build(self, sequences_shape: tuple[int | None, ...]) -> None:
        batch_size, _, features = sequences_shape
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: features})
        self.kernel = self.add_weight(
            shape=(features, 4 * self.units),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            autocast=False,
            name="kernel",
        )
        self.recurrent_kernel = self.add_weight(
            shape=(self.units, 4 * self.units),
            initializer=self.recurrent_initializer,
            regularizer=self.recurrent_regularizer,
            constraint=self.recurrent_constraint,
            autocast=False,
            name="recurrent_kernel",
        )
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(4 * self.units,),
                initializer=self._initial_bias,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
                autocast=False,
                name="bias",
            )
        if self.carried is not None:
            if batch_size is None:
                raise UserError(
                    "`carry_state=True` needs the batch size when the layer "
                    "is built; received None. Give it, for instance with "
                    "keras.Input(shape, batch_size=20)."
                )
            self.carried.build((batch_size, self.units))

    def call(
        self,
        sequences: Any,
        initial_state: State | None = None,
        mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        # Keras casts what is float alone.
        sequences = ops.cast(sequences, self.compute_dtype)
        sequences = self.input_dropout(sequences, training=training)
        if mask is not None:
            mask = _of_each_step(mask, sequences)
        if self.go_backwards:
            sequences = ops.flip(sequences, axis=1)
            mask = None if mask is None else ops.flip(mask, axis=1)
        h0, c0 = self.read_state(sequences, initial_state)
        y, h, c = lstm(sequences, h0, c0, *self.read_weights(training), mask)
        if initial_state is None:
            self.write_state(h, c)
        output = y if self.return_sequences else h
        return (output, h, c) if self.return_state else output

    def read_state(self, sequences: Any, initial_state: State | None) -> State:
        """The state to start from: the given one, the carried one, or zeros."""
        if initial_state is not None:
            states = [ops.cast(s, self.compute_dtype) for s in initial_state]
            return _of_each_row(states, sequences, self.units)
        if self.carried is None:
            return self.get_initial_state(ops.shape(sequences)[0])
        h, c = self.carried.read(sequences)
        # What is added to c in each batch may be too little for fewer bits.
        return ops.cast(h, self.compute_dtype), c

    def read_weights(self, training: bool | None) -> tuple[Any, Any, Any]:
        """Kernel, recurrent kernel and bias, as `ops.lstm` takes them."""
        bias = self.bias if self.use_bias else ops.zeros((4 * self.units,))
        weights = (self.kernel, self.recurrent_kernel, bias)
        kernel, recurrent_kernel, bias = lstm_weights(
            map(ops.convert_to_tensor, weights), self.compute_dtype
        )
        if training and self.weight_dropout:
            recurrent_kernel = self.weight_drop(recurrent_kernel, training=True)
        return kernel, recurrent_kernel, bias

    def write_state(self, h: Any, c: Any) -> None:
        """Keeps the state for the next batch, where it is carried."""
        if self.carried is not None:
            self.carried.write(h, c)

    def compute_mask(self, sequences: Any, mask: Any = None) -> Any:
        """The mask goes on with a sequence, with nothing else."""
        output_mask = mask if self.return_sequences else None
        return (output_mask, None, None) if self.return_state else output_mask

    def get_initial_state(self, batch_size: int) -> State:
        """Zeros for `batch_size` rows, as `keras.layers.LSTM` gives them."""
        zeros = ops.zeros((batch_size, self.units), self.compute_dtype)
        return zeros, zeros

    def reset_state(self) -> None:
        """Returns the carried state to zeros."""
        if self.carried is not None:
            self.carried.reset()

    def compute_output_shape(
        self, sequences_shape: tuple[int | None, ...], **states: Any
    ) -> Any:
        batch_size, time, _ = sequences_shape
        state = (batch_size, self.units)
        output: tuple[int | None, ...] = state
        if self.return_sequences:
            output = (batch_size, time, self.units)
        return (output, state, state) if self.return_state else output

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        objects: dict[str, Any] = {
            f"{weight}_{role}": serialize(getattr(self, f"{weight}_{role}"))
            for weight in ("kernel", "recurrent", "bias")
            for role in ("initializer", "regularizer", "constraint")
        }
        return {
            **super().get_config(),
            **objects,
            "units": self.units,
            "use_bias": self.use_bias,
            "unit_forget_bias": self.unit_forget_bias,
            "dropout": self.dropout,
            "weight_dropout": self.weight_dropout,
            "return_sequences": self.return_sequences,
            "return_state": self.return_state,
            "go_backwards": self.go_backwards,
            "carry_state": self.carry_state,
            "seed": self.seed,
        }

    def _initial_bias(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        bias = self.bias_initializer(shape, dtype=dtype)
        if not self.unit_forget_bias:
            return bias
        ones = ops.ones((self.units,), dtype=dtype)
        parts = (bias[: self.units], ones, bias[2 * self.units :])
        return ops.concatenate(parts)


def run_stack(
    layers: list[LSTM],
    sequence: Any,
    initial_states: list[State | None],
    training: bool | None = None,
) -> tuple[Any, list[State]]:
    """Runs LSTM layers on top of each other, in one call where a kernel can.

    Args:
        layers: Layers that have neither input dropout nor masks, built.
        sequence: Tensor of shape `(batch, time, features)`.
        initial_states: For each layer as its call argument.
        training: Whether weight dropout is applied.

    Returns:
        The last layer's outputs, `(batch, time, units)`, and for each layer
        `(h, c)` after the last step.
    """
    if len({layer.compute_dtype for layer in layers}) > 1:
        states: list[State] = []
        for layer, state in zip(layers, initial_states, strict=True):
            sequence, ends = run_stack([layer], sequence, [state], training)
            states += ends
        return sequence, states
    sequence = ops.cast(sequence, layers[0].compute_dtype)
    starts = [
        layer.read_state(sequence, state)
        for layer, state in zip(layers, initial_states, strict=True)
    ]
    weights = [layer.read_weights(training) for layer in layers]
    outputs, ends = lstm_stack(sequence, starts, weights)
    for layer, state, end in zip(layers, initial_states, ends, strict=True):
        if state is None:
            layer.write_state(*end)
    return outputs, ends


class _CarriedState(keras.layers.Layer):
    """Two tracked variables that are no weights.

    As `variables` they take part in the step that a backend compiles. They
    are not `weights`, so that `get_weights` of the LSTM is what Keras's is,
    and they are not saved, so that a weights file is for any batch size. (A
    `.keras` file has the shapes that its model was built for.)
    """

    def build(self, state_shape: tuple[int, int]) -> None:
        self.h, self.c = (
            self.add_weight(
                shape=state_shape,
                initializer="zeros",
                trainable=False,
                autocast=False,
                name=name,
            )
            for name in ("h", "c")
        )
        for variable in (self.h, self.c):
            variable.is_carried_state = True

    @property
    def weights(self) -> list[Any]:
        return []

    def save_own_variables(self, store: Any) -> None:
        pass

    def load_own_variables(self, store: Any) -> None:
        pass

    def read(self, sequence: Any) -> State:
        batch_size = sequence.shape[0]
        if batch_size not in (None, self.h.shape[0]):
            raise UserError(
                f"The state is carried for {self.h.shape[0]} rows; received "
                f"a batch of {batch_size}. Use the same batch size, pass "
                "`initial_state`, or take a LanguageModel's "
                f"copy(batch_size={batch_size})."
            )
        if batch_size is None:  # TensorFlow, which knows it at run time
            check_rows(sequence, self.h.shape[0])
        # A copy, since PyTorch's backward pass needs what is read here and
        # `write` overwrites the variable in place before it runs.
        h, c = (
            ops.copy(ops.convert_to_tensor(state)) for state in (self.h, self.c)
        )
        return h, c

    def write(self, h: Any, c: Any) -> None:
        for variable, state in ((self.h, h), (self.c, c)):
            state = ops.cast(state, variable.dtype)
            variable.assign(ops.stop_gradient(state))

    def reset(self) -> None:
        reset_carried_state(self)


@keras.saving.register_keras_serializable(package="multilstm")
class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout` by `ops.dropout`.

    Args:
        *args: Of `keras.layers.Dropout`.
        **kwargs: Of `keras.layers.Dropout`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with on_host():  # the seed's state
            super().__init__(*args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not (training and self.rate):
            return inputs
        return dropout(inputs, self.rate, self.noise_shape, self.seed_generator)


@keras.saving.register_keras_serializable(package="multilstm")
class Embedding(keras.layers.Embedding):
    """`keras.layers.Embedding` that drops words, and that clips right.

    Keras's layer gives TensorFlow a gradient in which a word that occurs
    twice in the batch is listed twice, and clipping takes the norm of that
    list. Here the gradient is dense, the same on every backend.

    Args:
        *args: Of `keras.layers.Embedding`.
        dropout: Share of the vocabulary's words to drop, in 0..1, whole
            vectors and one mask for a batch: wherever a dropped word stands,
            its vector is zero.
        seed: For the dropout mask.
        **kwargs: Of `keras.layers.Embedding`.

    Reference:
        Gal and Ghahramani, 2016, arXiv:1512.05287, section 4.2; Merity et
        al., 2018, arXiv:1708.02182, section 4.3.

    Example:
    >>> tuple(Embedding(10, 4)(np.array([[1, 2, 2]])).shape)
    (1, 3, 4)
    """

    def __init__(
        self,
        *args: Any,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = dropout
        self.seed = seed
        self.word_dropout = Dropout(dropout, seed=seed, dtype=self.dtype_policy)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        token_ids = ops.cast(inputs, "int32")
        table = ops.convert_to_tensor(self.embeddings)
        rows = embedding_lookup(table, token_ids)
        rows = ops.cast(rows, self.compute_dtype)
        if training and self.dropout:
            ones = ops.ones((self.input_dim, 1), self.compute_dtype)
            mask = self.word_dropout(ones, training=True)
            rows = rows * embedding_lookup(mask, token_ids)
        return rows

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "dropout": self.dropout,
            "seed": self.seed,
        }


class ResetCarriedState(keras.callbacks.Callback):
    """Sets carried states to zero where a text begins.

    That is at the start of each epoch, each evaluation and each prediction.
    `LanguageModel` adds it to `fit`, `evaluate` and `predict` itself; give it
    to those of any other model with `LSTM(carry_state=True)`.
    """

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        reset_carried_state(self.model)

    def on_test_begin(self, logs: Any = None) -> None:
        reset_carried_state(self.model)

    def on_predict_begin(self, logs: Any = None) -> None:
        reset_carried_state(self.model)


def reset_carried_state(model: Any) -> None:
    """Sets the carried state of every LSTM inside `model` to zero."""
    for variable in model.variables:
        if getattr(variable, "is_carried_state", False):
            variable.assign(np.zeros(variable.shape, np.float32))


def _of_each_row(states: list[Any], sequences: Any, units: int) -> State:
    """A state for each row, from one for all if need be.

    What has another shape is refused here: not every kernel looks.
    """
    rows = sequences.shape[0]  # None where it is not known yet
    shapes = [_shape_of(state) for state in states]
    if len(states) != 2 or not all(
        may_be(shape, (rows, units)) or may_be(shape, (1, units))
        for shape in shapes
    ):
        raise UserError(
            "`initial_state` must be h and c, each of shape "
            f"({rows or 'batch'}, {units}); received shapes "
            f"{', '.join(map(str, shapes))}. Give a state for each row."
        )
    h, c = (
        ops.broadcast_to(state, (ops.shape(sequences)[0], units))
        if shape[0] == 1 != rows
        else state
        for state, shape in zip(states, shapes, strict=True)
    )
    return h, c


def _of_each_step(mask: Any, sequences: Any) -> Any:
    """A mask of shape `(batch, time)`, from `(batch, time, 1)` if need be."""
    mask = ops.convert_to_tensor(mask)
    if _shape_of(mask)[2:] == (1,):
        mask = ops.squeeze(mask, 2)
    rows, steps = sequences.shape[:2]
    shape = _shape_of(mask)
    if not (may_be(shape, (rows, steps)) or may_be(shape, (1, steps))):
        raise UserError(
            "`mask` must have the shape (batch, time) of its sequences, "
            f"{(rows, steps)}; received {shape}."
        )
    if shape[0] == 1 != rows:
        mask = ops.broadcast_to(mask, ops.shape(sequences)[:2])
    return mask


def _shape_of(tensor: Any) -> tuple[int | None, ...]:
    """Its shape, of a matrix where TensorFlow knows none."""
    if getattr(tensor.shape, "rank", 0) is None:
        return None, None
    return tuple(tensor.shape)


def may_be(shape: Any, wanted: Any) -> bool:
    """Whether they are one shape, as far as both are known."""
    return len(shape) == len(wanted) and all(
        None in pair or pair[0] == pair[1]
        for pair in zip(shape, wanted, strict=True)
    )


def _check_activation(argument: str, activation: Any, needed: str) -> None:
    name = getattr(activation, "__name__", activation)
    home = getattr(activation, "__module__", None) or "builtins"
    if name != needed or home.partition(".")[0] not in _HAVE_ACTIVATIONS:
        whose = "" if name != needed else f" of {home}"
        raise UserError(
            f"`{argument}` must be {needed!r}, the only one that fast LSTM "
            f"kernels have; received {name!r}{whose}. Use keras.layers.LSTM "
            "for it."
        )
