"""How a model is fitted to a text: on the device, several steps at once.

The text lies on the device, and a batch is told by where its rows begin:

    text      0 1 2 3 4 5 6 7 8 9 ...
    row_starts [0, 5], length 3    ->    inputs  0 1 2    targets 1 2 3
                                                 5 6 7            6 7 8

Several steps are one call of the backend where it gains by that.
"""

import inspect
import math
import signal
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

from multilstm.dataset import RowStarts
from multilstm.errors import UserError
from multilstm.layers import ResetCarriedState
from multilstm.ops import (
    creating_variables,
    feed,
    keeping_variables,
    make_test_function,
    make_train_function,
    on_host,
    rows_here,
    starts_singly,
    steps_per_dispatch,
    sync_variables,
)

# A text that is larger is left on the disk, where `load_corpus` has it.
_MOST_TOKENS_ON_DEVICE = 1 << 24  # 64 MiB


class TextModel(keras.Model):
    """What `LanguageModel` is apart from its layers and its loss.

    Attributes:
        carry_state: Whether a batch starts from the state in which the one
            before ended.
        uses_own_loss: Whether the loss is that of `LanguageModel`.
        needs_logits: Whether metrics that a user compiled do.
        text: Token ids on the device, within `fit`.
        steps_per_execution: How many steps are run at once.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.carry_state = False
        self.uses_own_loss = True
        self.needs_logits = False
        self.text: Any = None
        self.steps_per_execution: int = 1
        self._rows: tuple[int, int] | None = None  # of the text's batches
        self._usual_length: int | None = None  # where that of batches varies
        self._functions: dict[Any, Any] = {}
        self._asked_steps: int | None = None
        self._text_of: Any = None
        self._text_ids: Any = None  # kept, so that no other has its `id`
        self._is_fitting = False
        self._text_kept: Any = None

    def step_flops(self, tokens: int) -> int:
        """Floating-point operations of a training step, products alone."""
        raise NotImplementedError

    def keeps_methods(self, *names: str) -> bool:
        """Whether a subclass leaves these methods as they are."""
        raise NotImplementedError

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.compile`, whose steps at once a user may give."""
        self._asked_steps = kwargs.get("steps_per_execution")
        super().compile(*args, **kwargs)
        self._functions = {}

    def get_compile_config(self) -> dict[str, Any]:
        """As Keras's, without what was chosen for this backend alone."""
        config: dict[str, Any] = super().get_compile_config()
        if self._asked_steps is None:
            config.pop("steps_per_execution", None)
        return config

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
        steps are started at once where the backend gains by it: as many as
        `compile` was told, or at most 16 that take about a second (on a GPU 64
        and a tenth of a second); one by one where a callback asks for every
        batch. Callbacks then hear of the last step of a group, as with
        Keras's `steps_per_execution`.

        Raises:
            UserError: If the model is not compiled, or there is a
                `class_weight`, which is for one label a row.
        """
        named = _by_name(keras.Model.fit, args, kwargs)
        if not self.compiled:
            raise UserError(
                "A model must be compiled before `fit`; this one is not. Call "
                "model.compile() first."
            )
        if named.get("class_weight"):
            raise UserError(
                "`class_weight` is for one label a row, not for words; "
                f"received {len(named['class_weight'])} weights. Give batches "
                "with a `sample_weight` of shape (batch, time)."
            )
        if self.carry_state:
            named.setdefault("shuffle", False)
            self._prepare_carry(named)
        self._build_early()
        x = named.pop("x", None)
        shuffle = named.get("shuffle", True)
        _tell_direction(named.get("callbacks"))
        counts = [named.get(n) for n in ("steps_per_epoch", "validation_steps")]
        with self._prepare_steps(
            x, named.get("callbacks"), shuffle, math.gcd(*filter(None, counts))
        ) as data:
            if data is not x and not isinstance(data, keras.utils.PyDataset):
                named["shuffle"] = False  # it is shuffled already
            interrupts = _Interrupts()
            callbacks = _with(interrupts, named.get("callbacks"))
            is_shown = named.get("verbose", "auto") != 0
            if self.steps_per_execution > 1 and is_shown:
                callbacks = _with_bar(callbacks)
            named["callbacks"] = callbacks
            is_within, self._is_fitting = self._is_fitting, True
            try:
                with interrupts.kept(), keeping_variables(self):
                    return super().fit(data, **named)
            finally:
                self._is_fitting = is_within

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`; starts from a state of zeros.

        Within a `fit`, as a callback may, it leaves the state as it was.
        """
        named = _by_name(keras.Model.evaluate, args, kwargs)
        if self.carry_state:
            self._prepare_carry(named)
        # After Keras's own, which validates, an epoch begins anew.
        is_keras = named.get("_use_cached_eval_dataset", False)
        with self._keeping_carried(not is_keras), keeping_variables(self):
            return super().evaluate(**named)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.predict`; starts from a state of zeros.

        Within a `fit`, as a callback may, it leaves the state as it was.
        """
        named = _by_name(keras.Model.predict, args, kwargs)
        if self.carry_state:
            self._prepare_carry(named)
        # Within a `fit` it may be many, which PyTorch refuses.
        before = self.steps_per_execution
        self.steps_per_execution = self._asked_steps or 1
        try:
            with self._keeping_carried(), keeping_variables(self):
                return super().predict(**named)
        finally:
            self.steps_per_execution = before

    @contextmanager
    def _keeping_carried(self, is_asked: bool = True) -> Iterator[None]:
        """Another text is read within `fit`, whose own goes on after it."""
        if not (is_asked and self._is_fitting and self.carry_state):
            yield
            return
        sync_variables(self)
        before = [
            (variable, ops.convert_to_numpy(variable).copy())
            for variable in self.variables
            if getattr(variable, "is_carried_state", False)
        ]
        yield
        for variable, value in before:
            variable.assign(value)

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
            most = steps_per_dispatch(
                self.step_flops(data.batch_size * data.sequence_length)
            )
            steps = max(n for n in range(1, most + 1) if multiple % n == 0)
        is_large = is_sliced and len(data.token_ids) > _MOST_TOKENS_ON_DEVICE
        slices = is_sliced and not is_large
        # A `train_step` of a user's is given batches, not where they begin.
        if (
            slices
            and self.uses_own_loss
            and not self.needs_logits
            and self.keeps_methods("train_step")
        ):
            self._rows = (data.batch_size, data.sequence_length)
            # A text may have been changed in its place.
            ids = np.ascontiguousarray(data.token_ids)
            text = (id(data.token_ids), zlib.crc32(ids.data))
            if self._text_of != text:
                self._text_of, self._text_ids = text, data.token_ids
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

    @contextmanager
    def _scale_rate(self, batch: Any) -> Iterator[None]:
        """A rate in proportion to the batch's length, where that varies."""
        if self._usual_length is None:
            yield
            return
        length = ops.cast(ops.shape(batch[0])[1], "float32")
        optimizer: Any = self.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        with optimizer.rate_times(length / self._usual_length):
            yield

    def _batch_of(self, data: Any) -> Any:
        """The batch itself, where only the beginnings of its rows are told."""
        if self._rows is None:
            return data
        batch_size, length = self._rows
        shape = (rows_here(batch_size), 1)
        with on_host():
            places = ops.reshape(data[0], shape) + ops.arange(
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

    def forget_steps(self) -> None:
        """Frees what compiled or recorded steps hold."""
        self._functions = {}
        self.train_function = self.test_function = None

    def _build_early(self) -> None:
        """Makes all variables, where the batch size has no say.

        Keras makes them while it compiles a step, in which a mistake in the
        targets ends, and with it what was made.
        """
        with creating_variables(self):
            if not self.built and not self.carry_state:
                self.build((None, None))
            if self.built:
                self.optimizer.build(self.trainable_variables)

    def _prepare_carry(self, named: dict[str, Any]) -> None:
        """Builds for the batch size of the data; resets where text begins.

        TensorFlow builds a model for any batch size, of which there is no
        state to carry: the first batch tells.
        """
        data = named.get("x")
        if not self.built and isinstance(data, keras.utils.PyDataset):
            with creating_variables(self):
                self.build(data[0][0].shape)
        # In the validation of `fit` it is in the list that is handed on.
        named["callbacks"] = _with(ResetCarriedState(), named.get("callbacks"))


def _by_name(
    method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A method's arguments by their names, whichever way they were given."""
    bound = inspect.signature(method).bind(None, *args, **kwargs).arguments
    named: dict[str, Any] = dict(list(bound.items())[1:])  # without the model
    others: dict[str, Any] = named.pop("kwargs", {})
    return named | others


def _check_scales_rate(optimizer: Any) -> None:
    # That of mixed_float16 has another in it, which makes the steps.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
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
    functions of a user's and those that do something every so many batches.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    base = keras.callbacks.Callback
    for callback in keras.tree.flatten(callbacks):
        kind = type(callback)
        is_lambda = isinstance(callback, keras.callbacks.LambdaCallback)
        is_keras = kind.__module__.partition(".")[0] == "keras"
        if not isinstance(callback, base):
            continue
        for name in ("save_freq", "update_freq"):
            if isinstance(getattr(callback, name, None), int):
                return True
        if is_keras and not is_lambda:
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


def _with(callback: Any, callbacks: Any) -> Any:
    """Adds a callback before a user's, unless Keras made a list of them."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    return [callback, *(keras.tree.flatten(callbacks) if callbacks else [])]


def _with_bar(callbacks: Any) -> Any:
    """Adds `_Bar` after the others, whose logs it shows, or leaves a user's."""
    bar = keras.callbacks.ProgbarLogger
    if isinstance(callbacks, keras.callbacks.CallbackList) or any(
        isinstance(callback, bar) for callback in callbacks
    ):
        return callbacks
    return [*callbacks, _Bar()]


class _Bar(keras.callbacks.ProgbarLogger):
    """Keras's bar, for groups of steps of which the last may be smaller.

    Keras counts the last one as whole: 32 of 25 batches.
    """

    async_safe = True  # as Keras's own; or it would wait for each group

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.target is not None:
            batch = min(batch, self.target - 1)
        super().on_train_batch_end(batch, logs)


class _Interrupts(keras.callbacks.Callback):
    """Raises a Ctrl-C again that Keras has dropped.

    To make numbers of a step's logs Keras waits for the step, in a block that
    drops whatever is raised meanwhile. On JAX that is most of the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted = False
        self._keeper = self  # whose handler it is, of a `fit` around this one

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Notes each Ctrl-C of the block, unless someone else does."""
        before = signal.getsignal(signal.SIGINT)
        of_another = getattr(before, "__self__", None)
        if isinstance(of_another, _Interrupts):
            self._keeper = of_another
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: Any) -> None:
        while frame is not None:  # what a callback drops it means to drop
            self.noted |= frame.f_code.co_name == "pythonify_logs"
            frame = frame.f_back
        raise KeyboardInterrupt

    def _raise_noted(self, *_: Any, **__: Any) -> None:
        if self._keeper.noted:
            raise KeyboardInterrupt

    on_epoch_begin = on_epoch_end = _raise_noted
    on_train_batch_begin = on_test_batch_begin = _raise_noted
