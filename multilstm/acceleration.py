"""A model made with Keras's LSTM -> the same model with this package's.

A model is copied layer by layer, each `keras.layers.LSTM` as a
`multilstm.layers.LSTM` and every other layer as itself, by its configuration;
then what the layers hold is copied:

    Embedding -> keras LSTM -> Dropout -> Dense    the model, not touched
        |            |            |         |
        |      same weights      seed       |      weights, statistics, ...
        v            v            v         v
    Embedding -> our LSTM   -> Dropout -> Dense    the copy

A model inside the model is copied in this way too. A layer that holds other
layers, as `Bidirectional` does, is copied whole, with Keras's LSTM inside.
"""

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from multilstm.errors import UserError
from multilstm.layers import LSTM

logger = logging.getLogger(__name__)

Clones = dict[Any, Any]  # by layer; what a model holds stands before it


def accelerate(model: Any) -> Any:
    """Copies a model, with this package's LSTM where Keras's is.

    For a model that is there already, trained or not, also one loaded from a
    `.keras` file. The copy has the same names, weights, frozen layers and
    dtype policies, and gives the same outputs to float rounding (where a mask
    hides the first steps and the initial state is not zero, see `LSTM`). It
    is compiled as the model is, with the state of the optimizer, so that
    training goes on. The model itself stays as it was.

    One warning names the LSTMs that are left as they are, and why: those
    inside a `Bidirectional`, a `TimeDistributed` or another layer, those with
    `stateful`, `recurrent_dropout`, `unroll` or other activations, an
    `RNN(LSTMCell)`, and classes derived from Keras's LSTM. It also names what
    cannot be carried, such as metrics that are functions of your own: those
    Keras gives back only if they are registered with it. A loss is carried.

    Dropout goes on from the same seeds; on PyTorch one that was given none
    draws from PyTorch's own. Before you load the copy from a `.keras` file,
    import `multilstm.layers`.

    Args:
        model: A `keras.Sequential`, built or not, or a functional
            `keras.Model`, with models inside, shared layers and several
            inputs and outputs as you like. A class derived from them serves
            if it has no constructor of its own.

    Returns:
        A model of the same class.

    Raises:
        UserError: If it is no such model, has a layer that cannot be copied,
            or has no LSTM that can be replaced.

    Example:
    >>> model = keras.Sequential([keras.Input((3, 5)), keras.layers.LSTM(4)])
    >>> faster = accelerate(model)
    >>> [type(layer).__module__ for layer in faster.layers]
    ['multilstm.layers']
    """
    _check_is_graph(model)
    clones, left = _replacements(model)
    if not clones:
        _refuse(model, left)
    copy = _clone(model, clones)
    layers = {k: v for k, v in clones.items() if isinstance(k, keras.Layer)}
    leaves = {k: v for k, v in layers.items() if not _is_graph(k)}
    for layer, clone in leaves.items():
        _build(layer, clone)
    # A model before what it holds, since setting `trainable` reaches down.
    for layer, clone in reversed(layers.items()):
        _copy_settings(layer, clone)
    for layer, clone in leaves.items():
        _copy_state(layer, clone)
    lost = []
    for layer, clone in layers.items():
        if _is_graph(layer) and layer.compiled:
            lost += _compile_alike(layer, clone)
    if len(copy.weights) != len(model.weights):
        lost.append("that layers share a weight, or a weight of no layer")
    _warn(model, left, lost)
    return copy


# What is replaced


def _is_graph(layer: Any) -> bool:
    """Whether it is a model that its layers and their graph define."""
    # The second is what functional models are; their class has no public name.
    is_graph = isinstance(layer, keras.Model) and isinstance(
        layer, keras.Sequential | keras.Function
    )
    # The constructor's arguments besides the graph would not be known.
    return is_graph and type(layer).__init__.__module__.startswith("keras.")


def _check_is_graph(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise UserError(
            "`model` must be a Keras model; received an object of class "
            f"{type(model).__name__}. Pass a keras.Sequential or a functional "
            "keras.Model."
        )
    if not _is_graph(model):
        raise UserError(
            "`model` must be a keras.Sequential or a functional keras.Model; "
            f"received a model of the class {type(model).__name__}, whose code "
            "says what it computes. Build it with multilstm.layers.LSTM "
            "itself, which takes the arguments and weights of "
            "keras.layers.LSTM."
        )


def _leaves(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The layers of a model and of the models in it, with their paths."""
    for layer in model.layers:
        if _is_graph(layer):
            yield from _leaves(layer, f"{prefix}{layer.name}/")
        else:
            yield prefix + layer.name, layer


def _replacements(model: Any) -> tuple[Clones, list[str]]:
    """Our LSTM for each that can be replaced, and why others cannot be."""
    clones: Clones = {}
    left: dict[Any, str] = {}
    for path, layer in _leaves(model):
        reason = _why_left(layer)
        if type(layer) is keras.layers.LSTM and layer not in clones:
            try:
                # `from_config` would turn its UserError into another one. A
                # configuration has no more than an activation's name.
                clones[layer] = LSTM(
                    **layer.get_config()
                    | {
                        "activation": layer.cell.activation,
                        "recurrent_activation": (
                            layer.cell.recurrent_activation
                        ),
                    }
                )
            except UserError as error:
                reason = str(error)
        if reason and layer not in left:
            left[layer] = f"{path} ({reason})"
    return clones, [*left.values()]


def _why_left(layer: Any) -> str | None:
    """Why a layer is left that has to do with Keras's LSTM, or is one."""
    name = type(layer).__name__
    kinds = (keras.layers.LSTM, keras.layers.LSTMCell)
    if type(layer) is keras.layers.LSTM:
        return None
    if isinstance(layer, kinds):
        return f"its class is {name}, not keras.layers.LSTM"
    inside = [inner for inner in _walk(layer) if isinstance(inner, kinds)]
    if not inside:
        return None
    if isinstance(layer, keras.layers.RNN):
        return f"keras.layers.RNN of {type(inside[0]).__name__}"
    return f"inside a {name}"


def _walk(layer: Any) -> list[Any]:
    """A layer and all layers that it holds, in Keras's order."""
    found: dict[Any, None] = {}
    waiting = [layer]
    while waiting:
        layer = waiting.pop()
        if layer in found:
            continue
        found[layer] = None
        held: list[Any] = []
        for value in vars(layer).values():
            held += value if isinstance(value, list) else [value]
        waiting += [v for v in reversed(held) if isinstance(v, keras.Layer)]
    return [*found]


def _refuse(model: Any, left: list[str]) -> None:
    layers = [layer for _, layer in _leaves(model)]
    found = ", ".join(left) or "no LSTM"
    if not left and any(type(layer) is LSTM for layer in layers):
        found = "multilstm.layers.LSTM already"
    kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
    raise UserError(
        "`model` must have a keras.layers.LSTM that can be replaced; received "
        f"{model.name!r}, which has {found} (its layers: {kinds}). Use it as "
        "it is."
    )


# The copy


def _clone(layer: Any, clones: Clones) -> Any:
    """The clone of a layer or model, made when it is first asked for."""
    if layer not in clones:
        if not _is_graph(layer):
            clone = _clone_leaf(layer)
        elif isinstance(layer, keras.Sequential):
            clone = _clone_sequential(layer, clones)
        else:
            clone = _clone_functional(layer, clones)
        clones[layer] = clone
    return clones[layer]


def _clone_leaf(layer: Any) -> Any:
    try:
        config = layer.get_config()
        shape = config.get("output_shape")
        if type(layer) is keras.layers.Lambda and not isinstance(shape, dict):
            # Its function cannot be had back from a configuration.
            names = ("function", "mask", "arguments")
            config |= {name: getattr(layer, name) for name in names}
            return keras.layers.Lambda(**config)
        return type(layer).from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise _not_copied(layer, _first_sentence(error)) from error


def _not_copied(layer: Any, why: str) -> UserError:
    return UserError(
        "Each layer must give a copy of itself by `get_config` and "
        f"`from_config`; received {layer.name!r} of the class "
        f"{type(layer).__name__}, which does not: {why}. Give it those, or "
        "build the model with multilstm.layers.LSTM itself."
    )


def _clone_sequential(model: Any, clones: Clones) -> Any:
    # `clone_model` would compile the clone, and fail at a loss of the user's.
    layers = [_clone(layer, clones) for layer in model.layers]
    if hasattr(model, "inputs"):  # it has been built
        graph = keras.Model(model.inputs, model.outputs, name=model.name)
        layers.insert(0, _clone_leaf(graph.layers[0]))  # not in model.layers
    return type(model)(layers, name=model.name)


def _clone_functional(model: Any, clones: Clones) -> Any:
    inputs = {
        layer.output: _clone_leaf(layer).output
        for layer in model.layers
        if isinstance(layer, keras.layers.InputLayer)
    }
    graph = keras.models.clone_model(
        # Its graph, which is not compiled: see above.
        keras.Model(model.input, model.output, name=model.name),
        # The inputs it would make have other names, and none is optional.
        input_tensors=keras.tree.map_structure(inputs.get, model.input),
        clone_function=lambda layer: _clone(layer, clones),
    )
    return type(model)(graph.input, graph.output, name=model.name)


# What the layers hold


def _is_replaced(layer: Any, clone: Any) -> bool:
    return type(clone) is LSTM and type(layer) is not LSTM


def _build(layer: Any, clone: Any) -> None:
    """Builds what the graph has not built: a model without inputs has none."""
    if _is_replaced(layer, clone):
        if layer.built and not clone.built:
            clone.build((None, None, layer.cell.kernel.shape[0]))
        return
    if layer.built and not clone.built:
        clone.build_from_config(layer.get_build_config())
    parts, copies = (
        [*map(type, _walk(one)), *(v.shape for v in one.variables)]
        for one in (layer, clone)
    )
    if parts != copies:
        raise _not_copied(layer, "the copy holds other layers or weights")


def _copy_settings(layer: Any, clone: Any) -> None:
    """Copies what can be changed after a layer was made."""
    if _is_graph(layer) or _is_replaced(layer, clone):
        pairs = [(layer, clone)]
    else:
        pairs = [*zip(_walk(layer), _walk(clone), strict=True)]
        for inner, copy in pairs:
            copy.supports_jit = inner.supports_jit
            if hasattr(inner, "use_cudnn"):  # it is in no configuration
                copy.use_cudnn = inner.use_cudnn
    for inner, copy in pairs:
        copy.trainable = inner.trainable
        if copy.dtype_policy.name != inner.dtype_policy.name:
            copy.dtype_policy = inner.dtype_policy


def _copy_state(layer: Any, clone: Any) -> None:
    """Copies weights, seeds, statistics, vocabularies and carried states."""
    # Keras's LSTM has a seed at the end, ours only where it has dropout.
    values = layer.variables[: len(clone.variables)]
    _assign(clone.variables, values)
    for variable, value in zip(clone.variables, values, strict=True):
        if variable.trainable != value.trainable:
            variable.trainable = value.trainable
    if _is_replaced(layer, clone):
        return
    for inner, copy in zip(_walk(layer), _walk(clone), strict=True):
        if getattr(inner, "states", None):  # of an RNN that is stateful
            states = (keras.tree.flatten(it.states) for it in (copy, inner))
            _assign(*states)
        if isinstance(inner, keras.layers.Normalization):
            copy.finalize_state()
        if hasattr(inner, "save_assets"):  # the words of a TextVectorization
            with tempfile.TemporaryDirectory() as folder:
                inner.save_assets(folder)
                copy.load_assets(folder)


def _assign(variables: list[Any], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        # A copy: on JAX a training step gives away the arrays it begins with.
        variable.assign(np.array(ops.convert_to_numpy(value)))


# What a model is compiled with


def _compile_alike(model: Any, clone: Any) -> list[str]:
    """Compiles the clone as the model is; returns what was not carried."""
    whole = f"what {model.name} is compiled with"
    if type(model).compile is not keras.Model.compile:
        return [f"{whole} (its class has a `compile` of its own)"]
    try:
        settings, lost = _compile_settings(model)
    except (OSError, TypeError, ValueError) as error:
        return [f"{whole} ({_first_sentence(error)})"]
    clone.compile(**settings)
    if model.optimizer is not None and model.optimizer.built:
        clone.optimizer.build(clone.trainable_variables)
        state, values = clone.optimizer.variables, model.optimizer.variables
        if [v.shape for v in state] == [v.shape for v in values]:
            _assign(state, values)
        else:  # layers were frozen or set free since
            lost.append(
                f"the state of the optimizer of {model.name} (it is for other "
                "weights than those that can be trained now)"
            )
    return lost


def _compile_settings(model: Any) -> tuple[dict[str, Any], list[str]]:
    """The arguments for `compile`, and what could not be carried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a lambda, which no file could hold
        settings = model.get_compile_config()
        # The one it has now, whose scaling of the loss is part of it.
        optimizer = model.optimizer
        if optimizer is not None:
            optimizer = type(optimizer).from_config(optimizer.get_config())
    # Itself: a function may not be registered, and Huber forgets its delta.
    loss = model.loss if settings["loss"] is not None else None
    settings |= {"optimizer": None, "loss": None}
    lost = []
    for name, config in settings.items():
        try:
            # Safe, since a lambda comes back without its module's names.
            settings[name] = keras.saving.deserialize_keras_object(
                config, safe_mode=True
            )
        except (TypeError, ValueError) as error:
            settings[name] = None
            lost.append(f"{name} of {model.name} ({_first_sentence(error)})")
    # Keras's LSTM may itself have turned XLA off, for the whole model.
    if any(
        type(layer) is keras.layers.LSTM and not layer.supports_jit
        for layer in _walk(model)
    ):
        settings["jit_compile"] = "auto"
    settings |= {"optimizer": optimizer, "loss": loss, "auto_scale_loss": False}
    return settings, lost


# What is said


def _first_sentence(error: Exception) -> str:
    # Keras's `from_config` puts the whole configuration before the reason.
    reason = str(error).rpartition("Exception encountered: ")[2]
    return re.split(r"\.\s|\n", reason)[0]


def _warn(model: Any, left: list[str], lost: list[str]) -> None:
    notes = {"left as they are": left, "not carried": lost}
    parts = [f"{what}: {', '.join(it)}" for what, it in notes.items() if it]
    if parts:
        logger.warning("accelerate(%s): %s", model.name, "; ".join(parts))
