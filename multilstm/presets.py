"""Settings of published models: every number with its source.

A preset is data. Learning rate and clipping are those of its source, for a
loss summed over time and averaged over the rows where `loss_sum_over_time`
says so, as Zaremba's and TensorFlow's tutorial code have it. Ours is the mean
over tokens: `sequence_length` times smaller, and so are its gradients. The
optimizer is therefore given `learning_rate * sequence_length` and
`clip_norm / sequence_length`, which gives the same update.
"""

from dataclasses import dataclass
from typing import Any, Literal

from multilstm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Architecture, data, optimizer and schedule of one model.

    Attributes:
        name: As `--preset` takes it.
        source: Where the numbers come from.
        units: Of each LSTM layer.
        num_layers: Number of LSTM layers.
        embedding_dim: Size of a word's vector.
        input_dropout: Between embedding and first layer, in 0..1.
        hidden_dropout: Between layers.
        output_dropout: Between last layer and logits.
        tied_embeddings: Whether the logits use the embeddings.
        initializer_scale: Half the width of the uniform draw of every
            weight, biases too. None: Keras's defaults.
        unit_forget_bias: Whether forget biases start at 1.
        batch_size: Rows a batch.
        sequence_length: Steps of back-propagation.
        carry_state: Whether rows go on from batch to batch
            (`ContinuousStreams`); otherwise `NextWordWindows`.
        optimizer: `"sgd"` or `"adam"`.
        learning_rate: As in the source, see above.
        learning_rate_decay: Factor for each epoch after `decay_after`.
        decay_after: Epochs at the full rate.
        clip_norm: Largest global norm of the gradients, or None.
        loss_sum_over_time: The loss to which rate and norm refer.
        epochs: Passes over the training text.
        published_valid: Perplexity on PTB that the source reports, or None.
        published_test: The same on its test split.
    """

    name: str
    source: str
    units: int
    num_layers: int
    embedding_dim: int
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    tied_embeddings: bool = False
    initializer_scale: float | None = None
    unit_forget_bias: bool = True
    batch_size: int
    sequence_length: int
    carry_state: bool
    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    learning_rate_decay: float = 1.0
    decay_after: int = 0
    clip_norm: float | None = None
    loss_sum_over_time: bool = False
    epochs: int
    published_valid: float | None = None
    published_test: float | None = None

    def learning_rate_of(self, epoch: int) -> float:
        """The optimizer's rate in `epoch`, counted from 0.

        >>> [PRESETS["zaremba_small"].learning_rate_of(e) for e in (3, 4, 5)]
        [20.0, 10.0, 5.0]
        """
        decays = max(0, epoch + 1 - self.decay_after)
        scale = self.sequence_length if self.loss_sum_over_time else 1
        return self.learning_rate * scale * self.learning_rate_decay**decays

    def clip_norm_of_mean(self) -> float | None:
        """The largest norm of gradients of a loss averaged over tokens."""
        if self.clip_norm is None or not self.loss_sum_over_time:
            return self.clip_norm
        return self.clip_norm / self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch."""
        return self.batch_size * self.sequence_length

    def architecture(self) -> dict[str, Any]:
        """The arguments of `LanguageModel` that the preset fixes."""
        names = (
            "units num_layers embedding_dim input_dropout hidden_dropout "
            "output_dropout tied_embeddings initializer_scale "
            "unit_forget_bias carry_state"
        )
        return {name: getattr(self, name) for name in names.split()}


_ZAREMBA = (
    "Zaremba, Sutskever and Vinyals, 2014, 'Recurrent neural network "
    "regularization', arXiv:1409.2329, section 4.1"
)

_PRESETS = (
    Preset(
        name="small",
        source="ours: minutes on two cores for the python-docs corpus",
        units=256,
        num_layers=2,
        embedding_dim=256,
        input_dropout=0.4,
        hidden_dropout=0.4,
        output_dropout=0.4,
        tied_embeddings=True,
        initializer_scale=0.1,
        batch_size=10,
        sequence_length=20,
        carry_state=True,
        optimizer="adam",
        learning_rate=0.003,
        learning_rate_decay=0.7,
        decay_after=4,
        clip_norm=1.0,
        epochs=8,
    ),
    Preset(
        name="tutorial",
        source=(
            "adventuresinmachinelearning.com, 'Keras LSTM tutorial', 2018: "
            "Keras's defaults, Adam, windows side by side"
        ),
        units=500,
        num_layers=2,
        embedding_dim=500,
        output_dropout=0.5,
        batch_size=20,
        sequence_length=30,
        carry_state=False,
        optimizer="adam",
        learning_rate=0.001,
        epochs=50,
    ),
    Preset(
        name="zaremba_small",
        source=_ZAREMBA + ", non-regularized LSTM",
        units=200,
        num_layers=2,
        embedding_dim=200,
        initializer_scale=0.1,
        unit_forget_bias=False,
        batch_size=20,
        sequence_length=20,
        carry_state=True,
        optimizer="sgd",
        learning_rate=1.0,
        learning_rate_decay=0.5,
        decay_after=4,
        clip_norm=5.0,
        loss_sum_over_time=True,
        epochs=13,
        published_valid=120.7,
        published_test=114.5,
    ),
    Preset(
        name="zaremba_medium",
        source=(
            _ZAREMBA + ", medium regularized LSTM; its rate decays by 0.8 as "
            "in TensorFlow's tutorial of it, where the paper divides by 1.2"
        ),
        units=650,
        num_layers=2,
        embedding_dim=650,
        input_dropout=0.5,
        hidden_dropout=0.5,
        output_dropout=0.5,
        initializer_scale=0.05,
        unit_forget_bias=False,
        batch_size=20,
        sequence_length=35,
        carry_state=True,
        optimizer="sgd",
        learning_rate=1.0,
        learning_rate_decay=0.8,
        decay_after=6,
        clip_norm=5.0,
        loss_sum_over_time=True,
        epochs=39,
        published_valid=86.2,
        published_test=82.7,
    ),
    Preset(
        name="zaremba_large",
        source=_ZAREMBA + ", large regularized LSTM",
        units=1500,
        num_layers=2,
        embedding_dim=1500,
        input_dropout=0.65,
        hidden_dropout=0.65,
        output_dropout=0.65,
        initializer_scale=0.04,
        unit_forget_bias=False,
        batch_size=20,
        sequence_length=35,
        carry_state=True,
        optimizer="sgd",
        learning_rate=1.0,
        learning_rate_decay=1 / 1.15,
        decay_after=14,
        clip_norm=10.0,
        loss_sum_over_time=True,
        epochs=55,
        published_valid=82.2,
        published_test=78.4,
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UserError: Lists the names there are.
    """
    if name not in PRESETS:
        raise UserError(
            f"A preset is one of {', '.join(PRESETS)}; received {name!r}."
        )
    return PRESETS[name]
