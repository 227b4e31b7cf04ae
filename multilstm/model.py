"""Ids -> logits: embedding, LSTM layers, projection, with dropout between.

    token_ids -> Embedding -> Dropout -> LSTM -> Dropout -> LSTM -> Dropout
    (batch, time)                                -> logits over the vocabulary

The dropouts are those of Zaremba et al., between layers, or with
`locked_dropout` those of Gal and Ghahramani, one mask for all time steps. Those
of Merity et al. come with them: of whole words and of recurrent weights. None
changes which LSTM kernel runs.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import keras
import numpy as np
from keras import ops

from multilstm.dataset import RowStarts
from multilstm.errors import UserError
from multilstm.initializers import Draws, Initialization
from multilstm.layers import (
    LSTM,
    Dropout,
    Embedding,
    ResetCarriedState,
    State,
    run_stack,
)
from multilstm.metrics import (
    Perplexity,
    mean_of,
    nats_and_tokens,
    token_weights,
)
from multilstm.ops import (
    feed,
    fuse_optimizer,
    jit_of_steps,
    logs_to_reduce,
    make_test_function,
    make_train_function,
    on_host,
    rows_here,
    scale_loss,
    starts_singly,
    steps_per_dispatch,
)
from multilstm.optimizers import make_optimizer
from multilstm.presets import find_preset
from multilstm.projection import choose_softmax, make_projection

# A text that is larger is left on the disk, where `load_corpus` has it.
_MOST_TOKENS_ON_DEVICE = 1 << 24  # 64 MiB


@keras.saving.register_keras_serializable(package="multilstm")
class LanguageModel(keras.Model):
    """Predicts each next word of a text from the words before it.

    With its defaults for everything but the sizes it is the classic Keras
    tutorial's network without its dropout. `from_preset` gives the published
    ones. `compile()` without a loss trains on the cross-entropy in nats per
    token and reports `perplexity`, weighted by tokens.

    Args:
        vocabulary_size: Number of words.
        units: Of each LSTM layer: one number for `num_layers` layers, or a
            list with a number for each.
        num_layers: Number of LSTM layers, where `units` is one number.
        embedding_dim: Size of a word's vector. Default: the last layer's
            units.
        input_dropout: Share dropped between embedding and first layer.
        hidden_dropout: Share dropped between layers.
        output_dropout: Share dropped between last layer and logits.
        locked_dropout: Whether those three use one mask for all time steps
            (Gal and Ghahramani, 2016) instead of a new one for each.
        embedding_dropout: Share of the vocabulary's words dropped from a
            batch's inputs, one mask for the batch.
        weight_dropout: Share of the recurrent weights dropped, one mask for
            a batch (DropConnect; Merity et al., 2018).
        activation_regularization: Times the mean square of what the last
            layer gives to the logits, added to the loss (AR; Merity et al.,
            2017, arXiv:1708.01009, section 3).
        temporal_activation_regularization: Times the mean square of the
            difference of the last layer's output from step to step (TAR,
            likewise).
        tied_embeddings: Whether the logits use the embeddings
            (Press and Wolf, 2017). Where `embedding_dim` is not the last
            layer's units, a product without bias brings those to it.
        initializer_scale: Half the width of the uniform draw of all weights
            and biases. None: as Keras's layers do.
        initializer: What `initializer_scale` is for: `"uniform"`, everything;
            `"torch"`, the embeddings, while the LSTMs are drawn uniform up to
            1 / sqrt(units) as PyTorch does and the logits' biases are zero;
            `"torch_normal"`, the same with embeddings that are normal with
            that standard deviation.
        unit_forget_bias: Whether forget biases start at 1, where
            `initializer_scale` is None.
        carry_state: Whether a batch starts from the state in which the one
            before ended; see `ContinuousStreams`.
        softmax: `"exact"`; `"adaptive"`, with fewer numbers for rare words;
            `"sampled"`, in training over a sample of the words. Words must
            be sorted by frequency, as those of a `Vocabulary` are.
        cutoffs: Of the adaptive softmax, the first word of each tail.
            Default: a twentieth and a quarter of the vocabulary.
        num_sampled: Of the sampled softmax, words drawn for a batch. Default:
            an eighth of the vocabulary, at most 8,192.
        seed: For initial weights, the same on every backend, and dropout.
        preset: Name of the preset whose optimizer `compile()` takes.
        **kwargs: Of `keras.Model`: `name`, `dtype`.

    Call arguments:
        token_ids: int tensor of shape `(batch, time)`.
        initial_state: For each layer `(h, c)` of shape `(batch, units)`.
        return_state: Whether to return the final states after the logits.
        training: Whether dropout is applied.

    Output shape:
        Logits `(batch, time, vocabulary_size)`; with `return_state` a tuple
        of them and the list of final states.

    Example:
    >>> model = LanguageModel(10, units=4, num_layers=1)
    >>> tuple(model(np.array([[1, 2, 3]])).shape)
    (1, 3, 10)
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        units: int | Sequence[int] = 500,
        num_layers: int = 2,
        embedding_dim: int | None = None,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
        locked_dropout: bool = False,
        embedding_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        activation_regularization: float = 0.0,
        temporal_activation_regularization: float = 0.0,
        tied_embeddings: bool = False,
        initializer_scale: float | None = None,
        initializer: Initialization = "uniform",
        unit_forget_bias: bool = True,
        carry_state: bool = False,
        softmax: str = "exact",
        cutoffs: Sequence[int] | None = None,
        num_sampled: int | None = None,
        seed: int = 0,
        preset: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        units_of = (
            [int(units)] * num_layers
            if isinstance(units, int | np.integer)
            else [int(size) for size in units]
        )
        if not units_of:
            raise UserError("`units` must have one layer or more; it has none.")
        if embedding_dim is None:
            embedding_dim = units_of[-1]
        _check_settings(locals())
        # Of NumPy, as `token_ids.max() + 1` is, Keras takes no sizes.
        vocabulary_size = int(vocabulary_size)
        embedding_dim = int(embedding_dim)
        self.settings: dict[str, Any] = {
            "vocabulary_size": vocabulary_size,
            "units": units_of,
            "num_layers": len(units_of),
            "embedding_dim": embedding_dim,
            "input_dropout": input_dropout,
            "hidden_dropout": hidden_dropout,
            "output_dropout": output_dropout,
            "locked_dropout": locked_dropout,
            "embedding_dropout": embedding_dropout,
            "weight_dropout": weight_dropout,
            "activation_regularization": activation_regularization,
            "temporal_activation_regularization": (
                temporal_activation_regularization
            ),
            "tied_embeddings": tied_embeddings,
            "initializer_scale": initializer_scale,
            "initializer": initializer,
            "unit_forget_bias": unit_forget_bias,
            "carry_state": carry_state,
            "seed": seed,
            "preset": preset,
        }
        softmax_settings = choose_softmax(
            softmax,
            vocabulary_size,
            cutoffs=cutoffs,
            num_sampled=num_sampled,
            tied=tied_embeddings,
        )
        self.settings |= softmax_settings
        self.vocabulary_size = vocabulary_size
        self.carry_state = carry_state
        self.preset = preset

        draw = Draws(initializer, initializer_scale, seed)

        # Layers
        self.embedding = Embedding(
            vocabulary_size,
            embedding_dim,
            embeddings_initializer=draw.embeddings(),
            dropout=embedding_dropout,
            seed=draw.seed_of("words"),
            dtype=self.dtype_policy,
            name="embedding",
        )
        self.dropouts = [
            Dropout(
                rate,
                noise_shape=(None, 1, None) if locked_dropout else None,
                seed=draw.seed_of("outputs", place),
                dtype=self.dtype_policy,
            )
            for place, rate in enumerate(
                [input_dropout]
                + [hidden_dropout] * (len(units_of) - 1)
                + [output_dropout]
            )
        ]
        self.lstms = [
            LSTM(
                units,
                kernel_initializer=draw.kernel(units, i, 0),
                recurrent_initializer=draw.kernel(units, i, 1),
                bias_initializer=draw.bias(units, i),
                unit_forget_bias=(
                    unit_forget_bias and initializer_scale is None
                ),
                weight_dropout=weight_dropout,
                return_sequences=True,
                return_state=True,
                carry_state=carry_state,
                seed=draw.seed_of("weights", i),
                dtype=self.dtype_policy,
                name=f"lstm_{i + 1}",
            )
            for i, units in enumerate(units_of)
        ]
        self.projection = make_projection(
            softmax_settings,
            vocabulary_size,
            kernel_initializer=draw.of_projection("glorot_uniform", 0),
            bias_initializer=draw.of_projection("zeros", 1),
            tied_to=self.embedding if tied_embeddings else None,
            seed=draw.seed_of("sample"),
            dtype=self.dtype_policy,
            name="projection",
        )
        self.step_seed = draw.seed_of("steps")
        self.perplexity = Perplexity()
        self.uses_own_loss = True
        self.needs_logits = False  # for metrics that a user compiled
        self._gives_features = False
        self.text: Any = None  # token ids on the device, within `fit`
        self._rows: tuple[int, int] | None = None  # of the text's batches
        self._usual_length: int | None = None  # where that of batches varies
        self._functions: dict[Any, Any] = {}
        self._asked_steps: int | None = None
        self._asked_jit: Any = "auto"
        self.steps_per_execution: int = 1
        self._text_of: Any = None
        self._text_kept: Any = None

    @classmethod
    def from_preset(
        cls, name: str, *, vocabulary_size: int, **overrides: Any
    ) -> "LanguageModel":
        """The model of a preset, its arguments replaced by `overrides`.

        Raises:
            UserError: If there is no such preset.
        """
        architecture = find_preset(name).architecture()
        arguments = architecture | {"preset": name} | overrides
        return cls(vocabulary_size, **arguments)

    def build(self, token_ids_shape: tuple[int | None, ...]) -> None:
        batch_size, time = token_ids_shape
        features = self.settings["embedding_dim"]
        self.embedding.build(token_ids_shape)
        for layer in self.lstms:
            layer.build((batch_size, time, features))
            features = layer.units
        self.projection.build((batch_size, time, features))

    def call(
        self,
        token_ids: Any,
        initial_state: list[State] | None = None,
        return_state: bool = False,
        training: bool | None = None,
    ) -> Any:
        outputs, features, final_state = self._read(
            token_ids, initial_state, training
        )
        if training:
            self._regularize(outputs, features)
        if self._gives_features:
            return features
        logits = self.projection(features)  # (batch, time, vocabulary_size)
        return (logits, final_state) if return_state else logits

    def read(
        self,
        token_ids: Any,
        initial_state: list[State] | None = None,
        training: bool | None = None,
    ) -> tuple[Any, list[State]]:
        """What words are predicted from, for a loss without logits.

        Args:
            token_ids: int tensor of shape `(batch, time)`.
            initial_state: As the call argument.
            training: As the call argument.

        Returns:
            The inputs of `projection`, `(batch, time, units)`, and for each
            layer its final `(h, c)`.
        """
        _, features, state = self._read(token_ids, initial_state, training)
        return features, state

    def _read(
        self,
        token_ids: Any,
        initial_state: list[State] | None,
        training: bool | None,
    ) -> tuple[Any, Any, list[State]]:
        """Last layer's outputs, features to predict from, and states."""
        # (batch, time, embedding_dim)
        x = self.embedding(token_ids, training=training)
        x = self.dropouts[0](x, training=training)
        states: list[Any] = initial_state or [None] * len(self.lstms)
        if len(states) != len(self.lstms):
            raise UserError(
                "`initial_state` must have one (h, c) for each of the "
                f"{len(self.lstms)} layers; received {len(states)}."
            )
        between = self.dropouts[1:-1]
        drops = bool(training) and any(dropout.rate for dropout in between)
        size = 1 if drops else len(self.lstms)  # layers run together
        final_state: list[State] = []
        for first in range(0, len(self.lstms), size):
            if first:
                x = between[first - 1](x, training=training)
            together = slice(first, first + size)
            x, ends = run_stack(
                self.lstms[together], x, states[together], training
            )
            final_state += ends
        features = self.dropouts[-1](x, training=training)
        return x, features, final_state

    def _regularize(self, outputs: Any, features: Any) -> None:
        """Adds to the loss what the last layer's outputs cost."""
        for factor, values in (
            (self.settings["activation_regularization"], features),
            (
                self.settings["temporal_activation_regularization"],
                outputs[:, 1:] - outputs[:, :-1],
            ),
        ):
            if factor and values.shape[1] != 0:
                squares = ops.square(ops.cast(values, "float32"))
                if values.shape[1] is None:
                    # TensorFlow, which knows at run time whether there are
                    # any: of one step there is no difference.
                    number = ops.cast(ops.size(squares), "float32")
                    mean = mean_of(ops.sum(squares), number)
                else:
                    mean = ops.mean(squares)
                self.add_loss(factor * mean)

    def get_initial_state(self, batch_size: int) -> list[State]:
        """NumPy zeros, the `initial_state` of texts that begin.

        Returns:
            For each layer `(h, c)`, float32 of shape `(batch_size, units)`.
        """
        zeros = (
            np.zeros((batch_size, layer.units), np.float32)
            for layer in self.lstms
        )
        return [(state, state) for state in zeros]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}

    def copy(
        self,
        *,
        dtype: Any = None,
        batch_size: int | None = None,
        **changes: Any,
    ) -> "LanguageModel":
        """A model with the same weights, not compiled.

        Args:
            dtype: Of the copy. Default: this model's.
            batch_size: The rows that a copy carries its state for. Default:
                as many as this model, where it does.
            changes: Other settings, as the constructor takes them.
        """
        copy = LanguageModel(
            **self.settings | changes, dtype=dtype or self.dtype_policy
        )
        carried = self.lstms[0].carried
        if batch_size is None and copy.carry_state and carried is not None:
            batch_size = carried.h.shape[0] if self.built else None
        copy.build((batch_size, None))
        if self.built:  # else both have those of the seed
            copy.set_weights(self.get_weights())
        return copy

    def compile(
        self, optimizer: Any = None, loss: Any = None, **kwargs: Any
    ) -> None:
        """As `keras.Model.compile`; the preset's optimizer by default."""
        self.uses_own_loss = loss is None
        self.needs_logits = bool(
            kwargs.get("metrics") or kwargs.get("weighted_metrics")
        )
        if (
            self.needs_logits
            and self.uses_own_loss
            and self.settings["softmax"] != "exact"
        ):
            raise UserError(
                "Metrics need the logits of all words, which "
                f"softmax={self.settings['softmax']!r} is there to avoid. "
                "Leave them out: the perplexity is reported without."
            )
        if optimizer is None and self.preset is not None:
            optimizer = make_optimizer(find_preset(self.preset))
        optimizer = optimizer or keras.optimizers.Adam()
        # Keras keeps what an earlier call has given, where this one does not.
        self._compile_loss = self._compile_metrics = None
        if not self.needs_logits:  # an empty list is none
            kwargs |= {"metrics": None, "weighted_metrics": None}
        self._asked_steps = kwargs.get("steps_per_execution")
        self._asked_jit = kwargs.pop("jit_compile", "auto")
        jit = jit_of_steps(self._asked_jit)
        super().compile(optimizer, loss, jit_compile=jit, **kwargs)
        self._functions = {}
        fuse_optimizer(self.optimizer)

    def get_compile_config(self) -> dict[str, Any]:
        """As Keras's, without what was chosen for this backend alone."""
        config: dict[str, Any] = super().get_compile_config()
        if self._asked_steps is None:
            config.pop("steps_per_execution", None)
        config["jit_compile"] = self._asked_jit
        if self._asked_jit == "auto":
            del config["jit_compile"]
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """As `keras.Model.compile_from_config`, for a `compile` of our own."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self) -> list[Any]:
        metrics: list[Any] = super().metrics
        if self.uses_own_loss:
            return metrics
        # It is counted beside the own loss alone, from the same softmax.
        return [m for m in metrics if m is not self.perplexity]

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if not self.uses_own_loss:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if len(y.shape) == 3 and y.shape[-1] == 1:
            y = ops.squeeze(y, -1)  # as Keras's losses do
        if len(y.shape) != 2:
            raise UserError(
                "Targets must be ids of words, of shape (batch, time); "
                f"received shape {tuple(y.shape)}. Leave one_hot out, or "
                "compile with keras.losses.CategoricalCrossentropy("
                "from_logits=True)."
            )
        if self._gives_features:
            y = ops.convert_to_tensor(y, "int32")
            weights = token_weights(y, sample_weight)
            nats = ops.sum(
                self.projection.negative_log_likelihood(
                    y_pred, y, weights, training=training
                )
            )
            tokens = ops.sum(weights)
        else:
            nats, tokens = nats_and_tokens(y, y_pred, sample_weight)
        self.perplexity.add(nats, tokens)
        loss = mean_of(nats, tokens)
        return scale_loss(sum(self.losses, start=loss))

    def train_step(self, *args: Any) -> Any:
        """As Keras's, its loss from features rather than logits."""
        *state, batch = args
        if self._rows is not None:
            batch = self._slice(batch[0], *self._rows)
        with self._give_features(), self._scale_rate(batch):
            found = super().train_step(*state, batch)
        return found if state else logs_to_reduce(found)

    def test_step(self, *args: Any) -> Any:
        """As Keras's, its loss from features rather than logits."""
        with self._give_features():
            return super().test_step(*args)

    @contextmanager
    def _give_features(self) -> Iterator[None]:
        """Lets `call` leave the logits to a loss that needs only a part.

        Keras hands to the loss what `call` returned.
        """
        self._gives_features = self.uses_own_loss and not self.needs_logits
        try:
            yield
        finally:
            self._gives_features = False

    @contextmanager
    def _scale_rate(self, batch: Any) -> Iterator[None]:
        """A rate in proportion to the batch's length, where that varies."""
        if self._usual_length is None:
            yield
            return
        length = ops.cast(ops.shape(batch[0])[1], "float32")
        with self.optimizer.rate_times(length / self._usual_length):
            yield

    def _slice(
        self, row_starts: Any, batch_size: int, length: int
    ) -> tuple[Any, Any]:
        """The batch whose rows begin there, from the text on the device."""
        shape = (rows_here(batch_size), 1)
        with on_host():
            places = ops.reshape(row_starts, shape) + ops.arange(
                length + 1, dtype="int32"
            )
            windows = ops.take(self.text, places, axis=0)
            return windows[:, :-1], windows[:, 1:]

    @contextmanager
    def text_on_device(self, text: Any) -> Iterator[None]:
        """Lets steps that are traced within take the text as an argument."""
        before, self.text = self.text, text
        try:
            yield
        finally:
            self.text = before

    def make_train_function(self, force: bool = False) -> None:
        """As `keras.Model.make_train_function`, for several steps at once."""
        key = (
            *("train", self.steps_per_execution, self._rows, id(self.text)),
            self._usual_length,
        )
        if force or key not in self._functions:
            self.train_function = make_train_function(self)
            super().make_train_function()
            # One for `fit`, which may have been for another text before.
            self._functions = {
                old: function
                for old, function in self._functions.items()
                if old[0] != "train" or old[2] is None
            }
            self._functions[key] = self.train_function
        self.train_function = self._functions[key]

    def make_test_function(self, force: bool = False) -> None:
        """As `keras.Model.make_test_function`; one for each number of steps."""
        key = ("test", self.steps_per_execution)
        if force or key not in self._functions:
            self.test_function = make_test_function(self)
            super().make_test_function()
            self._functions[key] = self.test_function
        self.test_function = self._functions[key]

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.fit`; in order and reset where state is carried.

        Of a dataset of this package the text is put on the device once, and
        a batch is told by where its rows begin; a text of over 16 million
        words stays where it is, and batches are read from there. Several
        steps are started at once where the backend gains by it, as many as
        `compile` was told or as take about a second; one by one where a
        callback asks for every batch. Callbacks then hear of the last step of
        a group, as with Keras's `steps_per_execution`.

        Raises:
            UserError: If there is a `class_weight`, which has no word of its
                own to weigh.
        """
        named = _by_name(keras.Model.fit, args, kwargs)
        if self.uses_own_loss and named.get("class_weight"):
            raise UserError(
                "`class_weight` is not for words; received "
                f"{len(named['class_weight'])} weights. Give batches with a "
                "`sample_weight` of shape (batch, time), or compile with a "
                "loss of Keras's."
            )
        if self.carry_state:
            named.setdefault("shuffle", False)
            self._prepare_carry(named)
        x = named.pop("x", None)
        shuffle = named.get("shuffle", True)
        _tell_direction(named.get("callbacks"))
        counts = [named.get(n) for n in ("steps_per_epoch", "validation_steps")]
        with self._prepare_steps(
            x, named.get("callbacks"), shuffle, math.gcd(*filter(None, counts))
        ) as data:
            if data is not x and not isinstance(data, keras.utils.PyDataset):
                named["shuffle"] = False  # it is shuffled already
            if self.steps_per_execution > 1 and named.get("verbose", "auto"):
                named["callbacks"] = _with_bar(named.get("callbacks"))
            return super().fit(data, **named)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`; starts from a state of zeros."""
        named = _by_name(keras.Model.evaluate, args, kwargs)
        if self.carry_state:
            self._prepare_carry(named)
        return super().evaluate(**named)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.predict`; starts from a state of zeros."""
        named = _by_name(keras.Model.predict, args, kwargs)
        if self.carry_state:
            self._prepare_carry(named)
        # Within a `fit` it may be many, which PyTorch refuses.
        before = self.steps_per_execution
        self.steps_per_execution = self._asked_steps or 1
        try:
            return super().predict(**named)
        finally:
            self.steps_per_execution = before

    @contextmanager
    def _prepare_steps(
        self, data: Any, callbacks: Any, shuffle: bool, multiple: int = 0
    ) -> Iterator[Any]:
        """Sets up what `fit` says of datasets and of several steps at once.

        Keras goes on to whole groups of steps: they divide `multiple`, of
        which what was asked for is made up; 0 for nothing.
        """
        steps = self._asked_steps or 1
        is_sliced = getattr(data, "is_sliced", False)
        varies = getattr(data, "varies", False)
        if varies:
            _check_scales_rate(self.optimizer)
        chooses = is_sliced and self._asked_steps is None
        at_once = not (_needs_every_batch(callbacks) or starts_singly(self))
        if chooses and at_once:
            most = steps_per_dispatch(self._flops(data))
            steps = max(n for n in range(1, most + 1) if multiple % n == 0)
        is_large = is_sliced and len(data.token_ids) > _MOST_TOKENS_ON_DEVICE
        slices = is_sliced and not is_large
        if slices and self.uses_own_loss and not self.needs_logits:
            self._rows = (data.batch_size, data.sequence_length)
            if not self.built:
                self.build(self._rows)
            if self._text_of is not data.token_ids:
                self._text_of = data.token_ids
                with on_host():
                    self._text_kept = ops.convert_to_tensor(data.token_ids)
            self.text = self._text_kept
            data = feed(RowStarts(data), shuffle=shuffle)
        elif varies or (is_large and not shuffle):
            if varies:
                self._usual_length = data.sequence_length
            data = feed(data, shuffle=False)
        before, self.steps_per_execution = self.steps_per_execution, steps
        try:
            with warnings.catch_warnings():
                # PyTorch's loop says so of a group that is smaller.
                if chooses and steps > 1:
                    warnings.filterwarnings(
                        "ignore", "Your input ran out of data"
                    )
                yield data
        finally:
            self._rows = self.text = self._usual_length = None
            self.steps_per_execution = before

    def _flops(self, data: Any) -> int:
        """Floating-point operations of a training step, products alone."""
        num_weights = self._kernel_sizes()
        features = self.lstms[-1].units
        num_weights += features * self.projection.words_per_target
        # Forward a product and a sum, back twice that.
        num_tokens: int = data.batch_size * data.sequence_length
        return 6 * num_weights * num_tokens

    def _kernel_sizes(self) -> int:
        """How many weights all LSTMs multiply with."""
        num_weights = 0
        features: int = self.settings["embedding_dim"]
        for layer in self.lstms:
            num_weights += (features + layer.units) * 4 * layer.units
            features = layer.units
        return num_weights

    def forget_steps(self) -> None:
        """Frees what compiled or recorded steps hold."""
        self._functions = {}
        self.train_function = self.test_function = None

    def least_num_weights(self) -> int:
        """What embeddings and kernels alone have, before they are built."""
        words: int = self.vocabulary_size * self.settings["embedding_dim"]
        return words + self._kernel_sizes()

    def _prepare_carry(self, named: dict[str, Any]) -> None:
        """Builds for the batch size of the data; resets where text begins.

        TensorFlow builds a model for any batch size, of which there is no
        state to carry: the first batch tells.
        """
        data = named.get("x")
        if not self.built and isinstance(data, keras.utils.PyDataset):
            self.build(data[0][0].shape)
        named["callbacks"] = _with_reset(named.get("callbacks"))


def _by_name(
    method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A method's arguments by their names, whichever way they were given."""
    bound = inspect.signature(method).bind(None, *args, **kwargs).arguments
    named: dict[str, Any] = dict(list(bound.items())[1:])  # without the model
    others: dict[str, Any] = named.pop("kwargs", {})
    return named | others


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("vocabulary_size", "embedding_dim"):
        if settings[name] < 1:
            raise UserError(
                f"`{name}` must be 1 or more; received {settings[name]}."
            )
    for name, value in settings.items():
        if name.endswith("_dropout") and name != "locked_dropout":
            if not 0 <= value < 1:
                raise UserError(
                    f"`{name}` must be from 0 up to, not including, 1; "
                    f"received {value}."
                )
        elif name.endswith("_regularization") and not value >= 0:
            raise UserError(f"`{name}` must be 0 or more; received {value}.")
    way = settings["initializer"]
    if way not in get_args(Initialization):
        raise UserError(
            "`initializer` must be one of "
            f"{', '.join(get_args(Initialization))}; received {way!r}."
        )
    if way != "uniform" and settings["initializer_scale"] is None:
        raise UserError(
            f"`initializer={way!r}` needs `initializer_scale`, that of the "
            "embeddings; received None."
        )


def _check_scales_rate(optimizer: Any) -> None:
    if not hasattr(optimizer, "rate_times"):
        raise UserError(
            "Batches of varying length need an optimizer whose rate can "
            f"follow it; received {type(optimizer).__name__}. Compile with SGD "
            "or Adam of multilstm.optimizers."
        )


def _tell_direction(callbacks: Any) -> None:
    """Tells Keras's callbacks, where they are to know, that less is better.

    Of a metric that was not compiled they do not ask.
    """
    for callback in keras.tree.flatten(callbacks):
        monitor = getattr(callback, "monitor", None)
        if monitor not in ("perplexity", "val_perplexity"):
            continue
        if getattr(callback, "mode", None) == "auto":
            callback.mode = "min"


def _needs_every_batch(callbacks: Any) -> bool:
    """Whether a callback of a user's does something at each batch.

    Keras's own know of several steps at once, all but the one that calls
    functions of a user's.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    base = keras.callbacks.Callback
    for callback in keras.tree.flatten(callbacks):
        kind = type(callback)
        is_lambda = isinstance(callback, keras.callbacks.LambdaCallback)
        is_keras = kind.__module__.partition(".")[0] == "keras"
        if not isinstance(callback, base) or (is_keras and not is_lambda):
            continue
        if getattr(callback, "takes_several_batches", False):
            continue
        for name in (
            "on_batch_begin",
            "on_batch_end",
            "on_train_batch_begin",
            "on_train_batch_end",
        ):
            if name in vars(callback) or (
                getattr(kind, name) is not getattr(base, name)
            ):
                return True
    return False


def _with_reset(callbacks: Any) -> Any:
    """Adds `ResetCarriedState`, unless it is there already.

    In the validation of `fit` Keras hands its own list to `evaluate`, which
    holds it since the start of `fit`.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    if callbacks is None:
        callbacks = []
    elif not isinstance(callbacks, (list, tuple)):
        callbacks = [callbacks]
    return [ResetCarriedState(), *callbacks]


def _with_bar(callbacks: Any) -> Any:
    """Adds `_Bar`, unless there is a bar already."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    listed = keras.tree.flatten(callbacks) if callbacks else []
    bar = keras.callbacks.ProgbarLogger
    if any(isinstance(callback, bar) for callback in listed):
        return callbacks
    return [*listed, _Bar()]


class _Bar(keras.callbacks.ProgbarLogger):
    """Keras's bar, for groups of steps of which the last may be smaller.

    Keras counts the last one as whole: 32 of 25 batches.
    """

    async_safe = True  # as Keras's own; or it would wait for each group

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.target is not None:
            batch = min(batch, self.target - 1)
        super().on_train_batch_end(batch, logs)
