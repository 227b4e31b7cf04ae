"""Ids -> logits: embedding, LSTM layers, projection, with dropout between.

    token_ids -> Embedding -> Dropout -> LSTM -> Dropout -> LSTM -> Dropout
    (batch, time)                                -> logits over the vocabulary

The dropouts are those of Zaremba et al.: between layers, never inside the
recurrence.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from multilstm.initializers import NumPyInitializer
from multilstm.layers import LSTM, Embedding, ResetCarriedState, State
from multilstm.presets import Preset, find_preset


@keras.saving.register_keras_serializable(package="multilstm")
class Perplexity(keras.metrics.Metric):
    """exp(total nats / total tokens), whatever the sizes of the batches.

    Unlike Keras's averages it weighs tokens, not rows. The sums are float32;
    for a figure to report use `multilstm.evaluate`, which sums in float64.

    Call arguments of `update_state`:
        y_true: int tensor of ids, shape `(batch, time)`.
        y_pred: Logits, shape `(batch, time, vocabulary)`.
        sample_weight: Shape `(batch, time)`; 0 leaves a token out.
    """

    def __init__(self, name: str = "perplexity", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.nats = self.add_weight(initializer="zeros", name="nats")
        self.tokens = self.add_weight(initializer="zeros", name="tokens")

    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> None:
        self.add(*_nats_and_tokens(y_true, y_pred, sample_weight))

    def add(self, nats: Any, tokens: Any) -> None:
        """Adds a sum of negative log-likelihoods over so many tokens."""
        self.nats.assign_add(ops.cast(nats, self.dtype))
        self.tokens.assign_add(ops.cast(tokens, self.dtype))

    def result(self) -> Any:
        return ops.exp(self.nats / ops.maximum(self.tokens, 1.0))


@keras.saving.register_keras_serializable(package="multilstm")
class LanguageModel(keras.Model):
    """Predicts each next word of a text from the words before it.

    With its defaults for everything but the sizes it is the classic Keras
    tutorial's network without its dropout. `from_preset` gives the published
    ones. `compile()` without a loss trains on the cross-entropy in nats per
    token and reports `perplexity`, weighted by tokens.

    Args:
        vocabulary_size: Number of words.
        units: Of each LSTM layer.
        num_layers: Number of LSTM layers.
        embedding_dim: Size of a word's vector. Default: `units`.
        input_dropout: Share dropped between embedding and first layer.
        hidden_dropout: Share dropped between layers.
        output_dropout: Share dropped between last layer and logits.
        tied_embeddings: Whether the logits use the embeddings
            (Press and Wolf, 2017); needs `embedding_dim == units`.
        initializer_scale: Half the width of the uniform draw of all weights
            and biases. None: as Keras's layers do.
        unit_forget_bias: Whether forget biases start at 1, where
            `initializer_scale` is None.
        carry_state: Whether a batch starts from the state in which the one
            before ended; see `ContinuousStreams`.
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
        units: int = 500,
        num_layers: int = 2,
        embedding_dim: int | None = None,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
        tied_embeddings: bool = False,
        initializer_scale: float | None = None,
        unit_forget_bias: bool = True,
        carry_state: bool = False,
        seed: int = 0,
        preset: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        embedding_dim = embedding_dim or units
        if tied_embeddings and embedding_dim != units:
            raise ValueError(
                "`tied_embeddings` needs embedding_dim == units; received "
                f"{embedding_dim} and {units}. Make them equal."
            )
        self.settings: dict[str, Any] = {
            "vocabulary_size": vocabulary_size,
            "units": units,
            "num_layers": num_layers,
            "embedding_dim": embedding_dim,
            "input_dropout": input_dropout,
            "hidden_dropout": hidden_dropout,
            "output_dropout": output_dropout,
            "tied_embeddings": tied_embeddings,
            "initializer_scale": initializer_scale,
            "unit_forget_bias": unit_forget_bias,
            "carry_state": carry_state,
            "seed": seed,
            "preset": preset,
        }
        self.vocabulary_size = vocabulary_size
        self.carry_state = carry_state
        self.preset = preset

        def initializer(kind: str, *place: int) -> NumPyInitializer:
            if initializer_scale is None:
                return NumPyInitializer(kind, seed=[seed, *place])
            return NumPyInitializer(
                "uniform", scale=initializer_scale, seed=[seed, *place]
            )

        def bias_initializer(*place: int) -> Any:
            if initializer_scale is None:
                return "zeros"
            return initializer("uniform", *place)

        # Layers
        self.embedding = Embedding(
            vocabulary_size,
            embedding_dim,
            embeddings_initializer=initializer("uniform", 0),
            dtype=self.dtype_policy,
            name="embedding",
        )
        self.dropouts = [
            keras.layers.Dropout(
                rate, seed=seed + place, dtype=self.dtype_policy
            )
            for place, rate in enumerate(
                [input_dropout]
                + [hidden_dropout] * (num_layers - 1)
                + [output_dropout]
            )
        ]
        self.lstms = [
            LSTM(
                units,
                kernel_initializer=initializer("glorot_uniform", 1, i, 0),
                recurrent_initializer=initializer("orthogonal", 1, i, 1),
                bias_initializer=bias_initializer(1, i, 2),
                unit_forget_bias=unit_forget_bias and not initializer_scale,
                return_sequences=True,
                return_state=True,
                carry_state=carry_state,
                dtype=self.dtype_policy,
                name=f"lstm_{i + 1}",
            )
            for i in range(num_layers)
        ]
        self.projection = _Projection(
            vocabulary_size,
            kernel_initializer=initializer("glorot_uniform", 2, 0),
            bias_initializer=bias_initializer(2, 1),
            tied_to=self.embedding if tied_embeddings else None,
            dtype=self.dtype_policy,
            name="projection",
        )
        self.perplexity = Perplexity()
        self.uses_own_loss = True

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
        x = self.embedding(token_ids)  # (batch, time, embedding_dim)
        states: Any = initial_state or [None] * len(self.lstms)
        final_state = []
        for dropout, layer, state in zip(
            self.dropouts[:-1], self.lstms, states, strict=True
        ):
            x = dropout(x, training=training)
            x, h, c = layer(x, initial_state=state)  # (batch, time, units)
            final_state.append((h, c))
        x = self.dropouts[-1](x, training=training)
        logits = self.projection(x)  # (batch, time, vocabulary_size)
        return (logits, final_state) if return_state else logits

    def get_initial_state(self, batch_size: int) -> list[State]:
        """NumPy zeros, the `initial_state` of texts that begin.

        Returns:
            For each layer `(h, c)`, float32 of shape `(batch_size, units)`.
        """
        zeros = np.zeros((batch_size, self.settings["units"]), np.float32)
        return [(zeros, zeros) for _ in self.lstms]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}

    def compile(
        self, optimizer: Any = None, loss: Any = None, **kwargs: Any
    ) -> None:
        """As `keras.Model.compile`; the preset's optimizer by default."""
        self.uses_own_loss = loss is None
        if optimizer is None and self.preset is not None:
            optimizer = make_optimizer(find_preset(self.preset))
        optimizer = optimizer or keras.optimizers.Adam()
        super().compile(optimizer, loss, **kwargs)

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
        nats, tokens = _nats_and_tokens(y, y_pred, sample_weight)
        self.perplexity.add(nats, tokens)
        loss = nats / ops.maximum(tokens, 1.0)
        return sum(self.losses, start=loss)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.fit`; in order and reset where state is carried."""
        if self.carry_state:
            kwargs.setdefault("shuffle", False)
            self._prepare_carry(args, kwargs)
        return super().fit(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`; starts from a state of zeros."""
        if self.carry_state:
            self._prepare_carry(args, kwargs)
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.predict`; starts from a state of zeros."""
        if self.carry_state:
            self._prepare_carry(args, kwargs)
        return super().predict(*args, **kwargs)

    def _prepare_carry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Builds for the batch size of the data; resets where text begins.

        TensorFlow builds a model for any batch size, of which there is no
        state to carry: the first batch tells.
        """
        data = args[0] if args else kwargs.get("x")
        if not self.built and isinstance(data, keras.utils.PyDataset):
            self.build(data[0][0].shape)
        kwargs["callbacks"] = _with_reset(kwargs.get("callbacks"))


def make_optimizer(preset: Preset) -> Any:
    """The Keras optimizer of a preset, at the rate of its first epoch."""
    make = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}
    return make[preset.optimizer](
        preset.learning_rate_of(0),
        global_clipnorm=preset.clip_norm_of_mean(),
    )


class _Projection(keras.layers.Layer):
    """Features -> logits, by a kernel of its own or by the embeddings."""

    def __init__(
        self,
        vocabulary_size: int,
        *,
        kernel_initializer: Any,
        bias_initializer: Any,
        tied_to: Embedding | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocabulary_size = vocabulary_size
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer
        self.tied_to = tied_to

    def build(self, features_shape: tuple[int | None, ...]) -> None:
        if self.tied_to is None:
            self.kernel = self.add_weight(
                shape=(features_shape[-1], self.vocabulary_size),
                initializer=self.kernel_initializer,
                name="kernel",
            )
        self.bias = self.add_weight(
            shape=(self.vocabulary_size,),
            initializer=self.bias_initializer,
            name="bias",
        )

    def call(self, features: Any) -> Any:
        if self.tied_to is None:
            kernel = ops.convert_to_tensor(self.kernel)
        else:
            kernel = ops.transpose(
                ops.cast(self.tied_to.embeddings, self.compute_dtype)
            )
        return ops.matmul(features, kernel) + self.bias


def _nats_and_tokens(
    targets: Any, logits: Any, sample_weight: Any
) -> tuple[Any, Any]:
    """The summed negative log-likelihood, and over how many tokens."""
    nll = ops.sparse_categorical_crossentropy(
        targets, ops.cast(logits, "float32"), from_logits=True
    )  # (batch, time)
    if sample_weight is None:
        sample_weight = ops.ones_like(nll)
    sample_weight = ops.cast(sample_weight, nll.dtype)
    if len(sample_weight.shape) < 2:  # a weight for each row
        sample_weight = ops.expand_dims(sample_weight, -1)
    sample_weight = ops.broadcast_to(sample_weight, ops.shape(nll))
    return ops.sum(nll * sample_weight), ops.sum(sample_weight)


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
