"""Ids -> logits: embedding, LSTM layers, projection, with dropout between.

    token_ids -> Embedding -> Dropout -> LSTM -> Dropout -> LSTM -> Dropout
    (batch, time)                                -> logits over the vocabulary

The dropouts are those of Zaremba et al., between layers, or with
`locked_dropout` those of Gal and Ghahramani, one mask for all time steps. Those
of Merity et al. come with them: of whole words and of recurrent weights. None
changes which LSTM kernel runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np
from keras import ops

from multilstm.errors import UserError, check_whole
from multilstm.fitting import TextModel
from multilstm.initializers import Draws, Initialization
from multilstm.layers import (
    LSTM,
    Dropout,
    Embedding,
    State,
    may_be,
    reset_carried_state,
    run_stack,
)
from multilstm.metrics import (
    Perplexity,
    mean_of,
    nats_and_tokens,
    token_weights,
)
from multilstm.ops import (
    fuse_optimizer,
    jit_of_steps,
    logs_to_reduce,
    scale_loss,
)
from multilstm.optimizers import make_optimizer
from multilstm.preset_files import describe, find_preset
from multilstm.presets import Preset
from multilstm.projection import choose_softmax, make_projection

# The model whose `call` gives features: in this thread, not in one that
# predicts meanwhile.
_gives_features: ContextVar[Any] = ContextVar("gives_features", default=None)


@keras.saving.register_keras_serializable(package="multilstm")
class LanguageModel(TextModel):
    """Predicts each next word of a text from the words before it.

    With its defaults for everything but the sizes it is the classic Keras
    tutorial's network without its dropout. `from_preset` gives the published
    ones. `compile()` without a loss trains on the cross-entropy in nats per
    token and reports `perplexity`, weighted by tokens; a subclass with a
    `call`, `compute_loss`, `compute_metrics` or `train_step` of its own is
    given logits and batches as Keras gives them.

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
        preset: The preset whose optimizer `compile()` takes, or its name.
        **kwargs: Of `keras.Model`: `name`, `dtype`.

    Call arguments:
        token_ids: int tensor of shape `(batch, time)`.
        initial_state: For each layer `(h, c)` of shape `(batch, units)`.
        return_state: Whether to return the final states after the logits.
        training: Whether dropout is applied.

    Output shape:
        Logits `(batch, time, vocabulary_size)`; with `return_state` a tuple
        of them and the list of final states.

    Raises:
        UserError: If an argument is out of its range, or some do not go
            together. When it is called, for ids or states of another shape.

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
        preset: str | Preset | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(preset, Preset):
            preset = describe(preset)  # as a saved model has it
        units_of = _units_of_layers(units, num_layers)
        if embedding_dim is None:
            embedding_dim = units_of[-1]
        # Of NumPy, as `token_ids.max() + 1` is, Keras takes no sizes.
        vocabulary_size = check_whole("vocabulary_size", vocabulary_size, 1)
        embedding_dim = check_whole("embedding_dim", embedding_dim, 1)
        seed = check_whole("seed", seed, 0)
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
        _check_settings(self.settings)
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
        self._asked_jit: Any = "auto"

    @classmethod
    def from_preset(
        cls,
        preset: str | Path | Preset,
        *,
        vocabulary_size: int,
        **overrides: Any,
    ) -> "LanguageModel":
        """The model of a preset, its arguments replaced by `overrides`.

        Args:
            preset: Its name, a JSON file of your own, or a `Preset`.
            vocabulary_size: Number of words.
            **overrides: Other arguments of the constructor.

        Raises:
            UserError: If there is no such preset.
        """
        found = find_preset(preset)
        arguments = found.architecture() | {"preset": found} | overrides
        return cls(vocabulary_size, **arguments)

    def build(self, token_ids_shape: tuple[int | None, ...]) -> None:
        _check_ids(token_ids_shape)
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
        if _gives_features.get() is self:
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
        _check_ids(token_ids.shape)
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

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.export`; ids are int32, carried states zero.

        Keras takes inputs of a model of one's own for numbers of its `floatx`.
        """
        if len(args) < 3 and kwargs.get("input_signature") is None:
            carried = self.lstms[0].carried
            rows = None if carried is None else carried.h.shape[0]
            ids = keras.InputSpec(shape=(rows, None), dtype="int32")
            kwargs["input_signature"] = [ids]
        # What is exported begins with the states there are.
        reset_carried_state(self)
        super().export(filepath, *args, **kwargs)

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

        Raises:
            UserError: If a subclass does not tell its own arguments.
        """
        config = self.get_config() | {"dtype": dtype or self.dtype_policy}
        del config["name"]
        try:
            copy: LanguageModel = type(self).from_config(config | changes)
        except TypeError as error:
            raise UserError(
                f"A copy is made by {type(self).__name__}.from_config, of what "
                "get_config() and `changes` say; its constructor refuses them. "
                "Let get_config() give its own arguments."
            ) from error
        carried = self.lstms[0].carried
        if batch_size is None and copy.carry_state and carried is not None:
            batch_size = carried.h.shape[0] if self.built else None
        copy.build((batch_size, None))
        if len(copy.weights) != len(self.weights) and self.built:
            raise UserError(
                "A copy has the weights that a model is built with; this one "
                f"has {len(self.weights) - len(copy.weights)} more, as LoRA "
                "adds them. Save the model and load it, which takes them in."
            )
        if self.built:  # else both have those of the seed
            copy.set_weights(self.get_weights())
        return copy

    def compile(
        self, optimizer: Any = None, loss: Any = None, **kwargs: Any
    ) -> None:
        """As `keras.Model.compile`; the preset's optimizer by default.

        Raises:
            UserError: For metrics beside a softmax that is not exact.
        """
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
        self._asked_jit = kwargs.pop("jit_compile", "auto")
        jit = jit_of_steps(self._asked_jit)
        super().compile(optimizer, loss, jit_compile=jit, **kwargs)
        fuse_optimizer(self.optimizer)

    def get_compile_config(self) -> dict[str, Any]:
        """As Keras's, without what was chosen for this backend alone."""
        config: dict[str, Any] = super().get_compile_config()
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
        if y is None:
            raise UserError(
                "Training needs targets, the next word of each; received none. "
                "Give them as y, or a dataset of this package as x."
            )
        if len(y.shape) == 3 and y.shape[-1] == 1:
            y = ops.squeeze(y, -1)  # as Keras's losses do
        if len(y.shape) != 2:
            raise UserError(
                "Targets must be ids of words, of shape (batch, time); "
                f"received shape {tuple(y.shape)}. Leave one_hot out, or "
                "compile with keras.losses.CategoricalCrossentropy("
                "from_logits=True)."
            )
        if not may_be(y.shape, y_pred.shape[:2]):
            raise UserError(
                "There must be a target for each word that is read, of shape "
                f"{tuple(y_pred.shape[:2])}; received {tuple(y.shape)}."
            )
        if _gives_features.get() is self:
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
        batch = self._batch_of(batch)
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
        token = _gives_features.set(self if self.loss_is_fused else None)
        try:
            yield
        finally:
            _gives_features.reset(token)

    @property
    def loss_is_fused(self) -> bool:
        """Whether the loss is computed from features, without logits.

        Not where logits are asked for, or a subclass may compute with them.
        """
        of_mine = ("call", "compute_loss", "compute_metrics")
        return (
            self.uses_own_loss
            and not self.needs_logits
            and self.keeps_methods(*of_mine)
        )

    def keeps_methods(self, *names: str) -> bool:
        """Whether a subclass, or what was set, leaves methods as they are."""
        return all(
            getattr(type(self), name) is getattr(LanguageModel, name)
            and name not in vars(self)
            for name in names
        )

    def step_flops(self, tokens: int) -> int:
        """Floating-point operations of a training step, products alone."""
        num_weights = self._kernel_sizes()
        features = self.lstms[-1].units
        num_weights += features * self.projection.words_per_target
        # Forward a product and a sum, back twice that.
        return 6 * num_weights * tokens

    def _kernel_sizes(self) -> int:
        """How many weights all LSTMs multiply with."""
        num_weights = 0
        features: int = self.settings["embedding_dim"]
        for layer in self.lstms:
            num_weights += (features + layer.units) * 4 * layer.units
            features = layer.units
        return num_weights

    def least_num_weights(self) -> int:
        """What embeddings and kernels alone have, before they are built."""
        words: int = self.vocabulary_size * self.settings["embedding_dim"]
        return words + self._kernel_sizes()


def _units_of_layers(units: Any, num_layers: Any) -> list[int]:
    """The units of each layer, of which all have as many or each its own."""
    if np.ndim(units) == 0:
        check_whole("num_layers", num_layers, 1)
        units = [units] * num_layers
    if not len(units):
        raise UserError("`units` must have one layer or more; it has none.")
    return [check_whole("units", size, 1) for size in units]


def _check_ids(shape: Any) -> None:
    if len(shape) != 2:
        raise UserError(
            "Ids of words must have the shape (batch, time); received "
            f"{tuple(shape)}. Of one text make a batch of one row: ids[None]."
        )


def _check_settings(settings: dict[str, Any]) -> None:
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
