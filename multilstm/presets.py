"""Settings of published models: every number with its source.

A preset is data. Learning rate, clipping and L2 are those of its source, for
the loss that the source has: the mean over tokens, the sum over time averaged
over the rows (Zaremba's and TensorFlow's tutorial code), or the sum over all
tokens of a batch. Ours is the mean: `loss_scale` times smaller, and so are its
gradients. The optimizer is therefore given `clip_norm` and `l2` divided by
that, SGD a learning rate times that (Adam's step does not depend on it, but
for its epsilon, which is divided too), which gives the same update.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multilstm.errors import UserError
from multilstm.files import check_kinds

OptimizerName = Literal["sgd", "adam"]
LossKind = Literal["mean", "sum_over_time", "sum"]
Averaging = Literal["never", "triggered", "always"]

_MOST_LAYERS = 1000  # before memory is taken for them

_ABOVE_ZERO = (
    *("learning_rate", "learning_rate_decay", "clip_norm"),
    *("plateau_factor", "length_std"),
)
_LEAST = {
    **dict.fromkeys(("embedding_dim", "batch_size", "sequence_length"), 1),
    **dict.fromkeys(("epochs", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("l2", "half_length_share", "plateau_threshold"), 0),
    **dict.fromkeys(_ABOVE_ZERO, 0),
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Architecture, data, optimizer and schedule of one model.

    Attributes:
        name: As `--preset` takes it.
        source: Where the numbers come from.
        units: Of each LSTM layer: one number, or one for each.
        num_layers: Number of LSTM layers, where `units` is one number.
        embedding_dim: Size of a word's vector.
        input_dropout: Between embedding and first layer, in 0..1.
        hidden_dropout: Between layers.
        output_dropout: Between last layer and logits.
        locked_dropout: Whether these have one mask for all time steps.
        embedding_dropout: Of whole words, one mask a batch.
        weight_dropout: Of the recurrent weights, one mask a batch.
        activation_regularization: AR, times the mean square.
        temporal_activation_regularization: TAR, likewise.
        tied_embeddings: Whether the logits use the embeddings.
        initializer_scale: Half the width of the uniform draw of every
            weight, biases too. None: Keras's defaults.
        initializer: What that is for, see `LanguageModel`.
        unit_forget_bias: Whether forget biases start at 1.
        batch_size: Rows a batch.
        sequence_length: Steps of back-propagation.
        length_std: Standard deviation of the lengths of batches, in steps,
            or None for one length (`VariableStreams`).
        half_length_share: Of the batches, those around half the length.
        rotates_rows: Whether rows begin at another place in each epoch.
        carry_state: Whether rows go on from batch to batch
            (`ContinuousStreams`); otherwise `NextWordWindows`.
        optimizer: `"sgd"` or `"adam"`.
        learning_rate: As in the source, see above.
        warmup_epochs: In which the rate grows, linearly, to the full one.
        learning_rate_decay: Factor for each epoch after `decay_after`.
        decay_after: Epochs at the full rate.
        plateau_factor: For the rate, after more than `plateau_patience`
            epochs without a better validation perplexity; None for none.
        plateau_patience: See there.
        plateau_threshold: Share by which the validation cross-entropy must
            fall to count as better.
        clip_norm: Largest global norm of the gradients, or None.
        l2: Times a weight it is added to its gradient.
        loss: To which rate, norm and L2 refer: `"mean"` over tokens,
            `"sum_over_time"`, a mean over the rows, or `"sum"`.
        gradient_accumulation_steps: Batches whose gradients make one step.
        averaging: Of the weights, from where it is evaluated: `"never"`,
            `"always"` or `"triggered"`, from when the validation perplexity
            is above what it was `non_monotone` epochs before or earlier.
        averaging_power: How much later weights count for more in the
            average, see `multilstm.optimizers.SGD`; of several averages the
            one with the lowest validation perplexity is taken in each epoch.
        non_monotone: See `averaging`.
        stops_non_monotone: Whether training ends where that triggers.
        starts_from: Preset whose best weights it begins with, or None.
        epochs: Passes over the training text.
        published_valid: Perplexity on PTB that the source reports, or None.
        published_test: The same on its test split.

    Raises:
        UserError: If a value is of another kind, or out of its range.
    """

    name: str
    source: str
    units: int | Sequence[int]
    num_layers: int
    embedding_dim: int
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    locked_dropout: bool = False
    embedding_dropout: float = 0.0
    weight_dropout: float = 0.0
    activation_regularization: float = 0.0
    temporal_activation_regularization: float = 0.0
    tied_embeddings: bool = False
    initializer_scale: float | None = None
    initializer: str = "uniform"
    unit_forget_bias: bool = True
    batch_size: int
    sequence_length: int
    length_std: float | None = None
    half_length_share: float = 0.0
    rotates_rows: bool = False
    carry_state: bool
    optimizer: OptimizerName
    learning_rate: float
    warmup_epochs: int = 0
    learning_rate_decay: float = 1.0
    decay_after: int = 0
    plateau_factor: float | None = None
    plateau_patience: int = 0
    plateau_threshold: float = 0.0
    clip_norm: float | None = None
    l2: float = 0.0
    loss: LossKind = "mean"
    gradient_accumulation_steps: int = 1
    averaging: Averaging = "never"
    averaging_power: float | Sequence[float] = 0.0
    non_monotone: int = 5
    stops_non_monotone: bool = False
    starts_from: str | None = None
    epochs: int
    published_valid: float | None = None
    published_test: float | None = None

    def __post_init__(self) -> None:
        check_kinds(vars(self), Preset, "a preset")
        if not 1 <= self.num_layers <= _MOST_LAYERS:
            raise UserError(
                f"`num_layers` of a preset must be from 1 to {_MOST_LAYERS}; "
                f"received {self.num_layers}."
            )
        if not isinstance(self.units, int) and (
            len(self.units) != self.num_layers
        ):
            raise UserError(
                "`units` of a preset must be one number, or one for each of "
                f"its {self.num_layers} layers (`num_layers`); received "
                f"{list(self.units)}."
            )
        if self.rotates_rows and self.length_std is None:
            raise UserError(
                "`rotates_rows` of a preset needs batches of varying length; "
                "`length_std` is none. Give it, or leave `rotates_rows` out."
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (
                value < least or (value == 0 and name in _ABOVE_ZERO)
            ):
                above = "above" if name in _ABOVE_ZERO else "at least"
                raise UserError(
                    f"`{name}` of a preset must be {above} {least}; received "
                    f"{value}."
                )

    @property
    def loss_scale(self) -> int:
        """How many times larger the source's loss is than the mean."""
        if self.loss == "sum_over_time":
            return self.sequence_length
        if self.loss == "sum":
            return self.tokens_per_step * self.gradient_accumulation_steps
        return 1

    def learning_rate_of(
        self, epoch: int, valid_perplexities: Sequence[float] = ()
    ) -> float:
        """The optimizer's rate in `epoch`, counted from 0.

        Args:
            epoch: Which.
            valid_perplexities: Of the epochs before, for a plateau.

        >>> [PRESETS["zaremba_small"].learning_rate_of(e) for e in (3, 4, 5)]
        [20.0, 10.0, 5.0]
        """
        decays = max(0, epoch + 1 - self.decay_after)
        scale = self.loss_scale if self.optimizer == "sgd" else 1
        rate = self.learning_rate * scale * self.learning_rate_decay**decays
        if epoch < self.warmup_epochs:
            rate *= (epoch + 1) / (self.warmup_epochs + 1)
        if self.plateau_factor is not None:
            rate *= self.plateau_factor ** self.num_plateaus(valid_perplexities)
        return rate

    def num_plateaus(self, valid_perplexities: Sequence[float]) -> int:
        """How often the rate has fallen because nothing became better.

        As `torch.optim.lr_scheduler.ReduceLROnPlateau` counts, given the
        cross-entropies.
        """
        best, num_bad, num_plateaus = math.inf, 0, 0
        for perplexity in valid_perplexities:
            cross_entropy = math.log(perplexity)
            if cross_entropy < best * (1 - self.plateau_threshold):
                best, num_bad = cross_entropy, 0
            else:
                num_bad += 1
            if num_bad > self.plateau_patience:
                num_plateaus, num_bad = num_plateaus + 1, 0
        return num_plateaus

    def is_non_monotone(self, valid_perplexities: Sequence[float]) -> bool:
        """Whether the last is above the best of those long enough before.

        Merity et al., 2018, arXiv:1708.02182, algorithm 1, as their code
        counts.

        >>> preset = PRESETS["awd"]
        >>> preset.is_non_monotone([90, 80, 81, 82, 83, 84])
        False
        >>> preset.is_non_monotone([80, 81, 82, 83, 84, 85, 86])
        True
        """
        *before, last = valid_perplexities
        if len(before) <= self.non_monotone:
            return False
        return last > min(before[: len(before) - self.non_monotone])

    def clip_norm_of_mean(self) -> float | None:
        """The largest norm of gradients of a loss averaged over tokens."""
        if self.clip_norm is None:
            return None
        return self.clip_norm / self.loss_scale

    def l2_of_mean(self) -> float:
        """`l2` for such gradients."""
        return self.l2 / self.loss_scale

    @property
    def units_of_layers(self) -> list[int]:
        """The units of each layer."""
        if isinstance(self.units, int):
            return [self.units] * self.num_layers
        return list(self.units)

    def num_parameters(self, vocabulary_size: int) -> int:
        """Weights and biases of the model.

        >>> PRESETS["zaremba_small"].num_parameters(10_000)
        4651600
        """
        number = vocabulary_size * self.embedding_dim
        features = self.embedding_dim
        for size in self.units_of_layers:
            number += (features + size + 1) * 4 * size
            features = size
        if not self.tied_embeddings:
            number += features * vocabulary_size
        elif features != self.embedding_dim:
            number += features * self.embedding_dim
        return number + vocabulary_size  # the biases of the logits

    def num_products(self, vocabulary_size: int) -> int:
        """Weights that a word is multiplied by: those of all but the lookup."""
        lookup = 0 if self.tied_embeddings else vocabulary_size
        return (
            self.num_parameters(vocabulary_size) - lookup * self.embedding_dim
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch."""
        return self.batch_size * self.sequence_length

    def shape(self, vocabulary_size: int) -> dict[str, Any]:
        """The sizes of network and batches, as `find_choice` takes them."""
        return {
            "units": self.units_of_layers,
            "embedding_dim": self.embedding_dim,
            "tied": self.tied_embeddings,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "vocabulary_size": vocabulary_size,
        }

    def architecture(self) -> dict[str, Any]:
        """The arguments of `LanguageModel` that the preset fixes."""
        names = (
            "units num_layers embedding_dim input_dropout hidden_dropout "
            "output_dropout locked_dropout embedding_dropout weight_dropout "
            "activation_regularization temporal_activation_regularization "
            "tied_embeddings initializer_scale initializer "
            "unit_forget_bias carry_state"
        )
        return {name: getattr(self, name) for name in names.split()}


_ZAREMBA = (
    "Zaremba, Sutskever and Vinyals, 2014, 'Recurrent neural network "
    "regularization', arXiv:1409.2329, section 4.1"
)

_LARGE: dict[str, Any] = {
    "units": 1500,
    "num_layers": 2,
    "embedding_dim": 1500,
    "input_dropout": 0.65,
    "hidden_dropout": 0.65,
    "output_dropout": 0.65,
    "initializer_scale": 0.04,
    "unit_forget_bias": False,
    "batch_size": 20,
    "sequence_length": 35,
    "carry_state": True,
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "learning_rate_decay": 1 / 1.15,
    "decay_after": 14,
    "clip_norm": 10.0,
    "loss": "sum_over_time",
    "epochs": 55,
}

_AWD: dict[str, Any] = {
    "units": (1150, 1150, 400),
    "num_layers": 3,
    "embedding_dim": 400,
    "input_dropout": 0.4,
    "hidden_dropout": 0.25,
    "output_dropout": 0.4,
    "locked_dropout": True,
    "embedding_dropout": 0.1,
    "weight_dropout": 0.5,
    "activation_regularization": 2.0,
    "temporal_activation_regularization": 1.0,
    "tied_embeddings": True,
    "initializer_scale": 0.1,
    "initializer": "torch",
    "unit_forget_bias": False,
    "batch_size": 20,
    "sequence_length": 70,
    "length_std": 5.0,
    "half_length_share": 0.05,
    "carry_state": True,
    "optimizer": "sgd",
    "learning_rate": 30.0,
    "clip_norm": 0.25,
    "l2": 1.2e-6,
    "epochs": 500,
}
_AWD_SOURCE = (
    "Merity, Keskar and Socher, 2018, 'Regularizing and optimizing LSTM "
    "language models', arXiv:1708.02182, section 5 and the commands of its "
    "code for PTB"
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
        loss="sum_over_time",
        epochs=13,
        published_valid=120.7,
        published_test=114.5,
    ),
    Preset(
        name="zaremba_medium",
        source=(
            _ZAREMBA + ", medium regularized LSTM; its rate is divided by "
            "1.2 as there, where TensorFlow's tutorial of it has 0.8"
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
        learning_rate_decay=1 / 1.2,
        decay_after=6,
        clip_norm=5.0,
        loss="sum_over_time",
        epochs=39,
        published_valid=86.2,
        published_test=82.7,
    ),
    Preset(
        name="zaremba_large",
        source=_ZAREMBA + ", large regularized LSTM",
        **_LARGE,
        published_valid=82.2,
        published_test=78.4,
    ),
    Preset(
        name="press_wolf_large",
        source=(
            "Press and Wolf, 2017, 'Using the output embedding to improve "
            "language models', arXiv:1608.05859, table 3, Large + WT: the "
            "large model of Zaremba et al., tied"
        ),
        **_LARGE,
        tied_embeddings=True,
        published_valid=77.7,
        published_test=74.3,
    ),
    Preset(
        name="adam_512",
        source=(
            "Rush, 2018, Harvard CS287, homework 2: two layers of 512, tied, "
            "Adam; loss and clipping of the sum over a batch"
        ),
        units=512,
        num_layers=2,
        embedding_dim=512,
        hidden_dropout=0.5,
        output_dropout=0.5,
        tied_embeddings=True,
        initializer_scale=1.0,
        initializer="torch_normal",
        unit_forget_bias=False,
        batch_size=128,
        sequence_length=32,
        carry_state=True,
        optimizer="adam",
        learning_rate=0.01,
        plateau_factor=0.25,
        plateau_patience=1,
        plateau_threshold=1e-3,
        clip_norm=2.0,
        l2=1e-4,
        loss="sum",
        epochs=30,
        published_valid=76.2,
        published_test=73.3,
    ),
    Preset(
        name="pytorch_650_tied",
        source=(
            "PyTorch's example word_language_model: --emsize 650 --nhid 650 "
            "--dropout 0.5 --epochs 40 --tied"
        ),
        units=650,
        num_layers=2,
        embedding_dim=650,
        input_dropout=0.5,
        hidden_dropout=0.5,
        output_dropout=0.5,
        tied_embeddings=True,
        initializer_scale=0.1,
        initializer="torch",
        unit_forget_bias=False,
        batch_size=20,
        sequence_length=35,
        carry_state=True,
        optimizer="sgd",
        learning_rate=20.0,
        plateau_factor=0.25,
        clip_norm=0.25,
        epochs=40,
        published_test=75.96,
    ),
    Preset(
        name="awd",
        source=_AWD_SOURCE,
        **_AWD,
        averaging="triggered",
        published_valid=60.7,
        published_test=58.8,
    ),
    Preset(
        name="awd_finetune",
        source=_AWD_SOURCE + ", finetuning",
        **_AWD,
        averaging="always",
        stops_non_monotone=True,
        starts_from="awd",
        published_valid=60.0,
        published_test=57.3,
    ),
    Preset(
        name="best",
        source=(
            "ours: awd, at the same compute, with rows that begin at another "
            "place in each epoch (Press, 2019, 'Partially shuffling the "
            "training data to improve language models', arXiv:1903.04167) and "
            "two averages from the first step on in which later weights count "
            "for more (Shamir and Zhang, 2013, arXiv:1212.1824), the better "
            "one of which is taken"
        ),
        **_AWD,
        rotates_rows=True,
        averaging="always",
        averaging_power=(2.0, 16.0),
    ),
    Preset(
        name="awd_adam",
        source=(
            "ours, for minutes: the model of best in a tenth of its epochs, by "
            "Adam on 80 rows, with a warm-up and a rate that falls"
        ),
        **_AWD
        | {
            "batch_size": 80,
            "rotates_rows": True,
            "optimizer": "adam",
            "learning_rate": 0.004,
            "warmup_epochs": 3,
            "learning_rate_decay": 0.9,
            "decay_after": 16,
            "epochs": 48,
        },
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a whole run of a preset reached here, on Penn Treebank.

    `small` is for python-docs, and was measured on it.

    Attributes:
        backend: With which.
        device: On which.
        valid: Validation perplexity of the best epoch.
        test: Test perplexity of its weights.
        minutes: Of training.
    """

    backend: str
    device: str
    valid: float
    test: float
    minutes: float


def _measured(
    device: str, **figures: tuple[float, float, float]
) -> tuple[Measured, ...]:
    """Of each backend valid, test and minutes."""
    return tuple(
        Measured(
            backend=backend,
            device=device,
            valid=valid,
            test=test,
            minutes=minutes,
        )
        for backend, (valid, test, minutes) in figures.items()
    )


MEASURED: dict[str, tuple[Measured, ...]] = {
    "small": _measured(  # on python-docs of Python 3.11.7
        "2 cores of an AMD EPYC",
        jax=(29.93, 34.72, 0.7),
        torch=(30.36, 35.74, 1.1),
        tensorflow=(30.54, 35.72, 1.2),
    ),
    "zaremba_small": _measured(
        "2 cores of an AMD EPYC, beside other work",
        jax=(118.48, 114.18, 47.0),
        torch=(117.44, 113.83, 46.9),
        tensorflow=(118.19, 114.07, 46.8),
    ),
    "zaremba_medium": _measured("NVIDIA H200", torch=(87.88, 83.93, 3.2)),
    "pytorch_650_tied": _measured("NVIDIA H200", torch=(79.87, 76.82, 2.2)),
    "awd_adam": _measured("NVIDIA H200", torch=(67.64, 65.54, 1.8)),
    "adam_512": _measured(
        "NVIDIA H200",
        torch=(74.11, 71.91, 0.5),
        jax=(75.60, 73.37, 0.5),
        tensorflow=(75.02, 73.02, 0.9),
    ),
}
