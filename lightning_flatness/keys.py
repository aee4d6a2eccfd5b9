"""Every key that is logged, in one table: what it is, its unit and direction, and which methods give it.

The evaluation, the rules, the figures, the report and the demo read this table, and a test compares it with
`docs/keys.md`. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

RELATIVE = "flatness/relative"
TRACE = "flatness/trace"
SCALE_FREE = "flatness/scale_free"
CONFIDENCE = "flatness/confidence"
HEAD = "flatness/head"
KERNEL = "flatness/kernel"
FEATURES = "flatness/features"
ALIGNMENT = "flatness/alignment"
ACEHT = "flatness/aceht"
MARGIN_CORRELATION = "flatness/margin_correlation"
MARGIN_SHARE = "flatness/margin_share"
MARGIN = "margin/mean"
NEGATIVE = "margin/negative"
SOFTMAX_MARGIN = "margin/softmax_mean"
MARGIN_BOUND = "margin/bound"
SCALE_FREE_MARGIN = "margin/scale_free"
CHURN = "margin/churn"
LEARNING_RATE = "learning_rate"
"""Not logged: an alert says how the learning rate has changed."""
NETWORK = "network"
"""Stands in the place of a layer's name."""
OF_LAYER = (RELATIVE, TRACE)
"""The keys that each of several layers has."""
RELATIVE_GGN = f"{RELATIVE}/ggn"
TRACE_GGN = f"{TRACE}/ggn"
LABELLED = {RELATIVE: RELATIVE_GGN, TRACE: TRACE_GGN}
"""The keys of the Gauss-Newton part, which stand for those of the Hessian where this would take too long."""


class Key(NamedTuple):
    """One quantity that a validation logs.

    Attributes:
        name: the key itself, such as `flatness/relative`.
        title: the heading in figures and tables.
        unit: the unit of the value; "none" for a pure number. "loss" is the unit of the loss, nats for cross-entropy.
        direction: the direction that is better, in words; "none of its own" where neither is.
        source: letters of the sources in `docs/keys.md`.
        better: `"lower"`, `"higher"` or None.
        methods: the methods that give it.
    """

    name: str
    title: str
    unit: str
    direction: str
    source: str
    better: Literal["lower", "higher"] | None = None
    methods: tuple[str, ...] = ("pooled", "classifier", "jacobian")


_FLAT = "lower is flatter"
_SAFE = "higher is better"
_OURS = "this package"
_CLOSED = ("pooled", "classifier")  # methods with a closed form
_TABLE = (
    Key(RELATIVE, "Relative flatness", "loss", _FLAT, "[P], [T]", "lower"),
    Key(TRACE, "Hessian trace", "loss per squared weight", _FLAT, "[T]", "lower"),
    Key(SCALE_FREE, "Scale-free flatness", "loss", _FLAT, "this package, after [G]", "lower", methods=_CLOSED),
    Key(CONFIDENCE, "Uncertainty 1 - |S|²", "none", "lower is more confident", "[M]", "lower"),
    Key(HEAD, "Head factor", "squared weight", "none of its own", _OURS, methods=_CLOSED),
    Key(KERNEL, "Kernel factor", "squared weight", "none of its own", _OURS, methods=("pooled",)),
    Key(FEATURES, "Feature factor", "squared feature per squared weight", "none of its own", _OURS, methods=_CLOSED),
    Key(ALIGNMENT, "Alignment factor", "none", _FLAT, _OURS, "lower", methods=_CLOSED),
    Key(ACEHT, "Hessian trace of the classifier", "loss per squared weight", _FLAT, "[M]", "lower", methods=_CLOSED),
    Key(
        MARGIN_CORRELATION,
        "Correlation of trace and margin bound",
        "none",
        "none; near 1 the margins predict the flatness",
        "[M]",
        methods=_CLOSED,
    ),
    Key(MARGIN_SHARE, "Margin share of the trace", "none, 0 to 1", "none of its own", _OURS, methods=_CLOSED),
    Key(MARGIN, "Mean output margin", "logit", _SAFE, "[M], signed", "higher"),
    Key("margin/std", "Standard deviation of the margins", "logit", "none", "[M]"),
    Key("margin/skewness", "Skewness of the margins", "none", "lower (left) is better in [M]", "[M]", "lower"),
    Key("margin/min", "Smallest margin", "logit", _SAFE, "[M]", "higher"),
    *(
        Key(f"margin/q{percent:02}", f"Margin, {percent}% quantile", "logit", _SAFE, _OURS, "higher")
        for percent in (1, 5, 25, 50, 75, 95, 99)
    ),
    Key(NEGATIVE, "Share of negative margins", "none, 0 to 1", "lower is better", _OURS, "lower"),
    Key(SCALE_FREE_MARGIN, "Scale-free margin", "none", _SAFE, "this package, after [G]", "higher", methods=_CLOSED),
    Key(CHURN, "Share of changed predictions", "none, 0 to 1", "none of its own", "[F]"),
    Key(SOFTMAX_MARGIN, "Mean softmax margin", "none, -1 to 1", _SAFE, "[M], signed", "higher"),
    Key(MARGIN_BOUND, "Margin bound of the trace", "loss per squared weight", _FLAT, "[M]", "lower", methods=_CLOSED),
)

KEYS: dict[str, Key] = {key.name: key for key in _TABLE}
"""Every key by its name, in the order of the documentation."""

FACTORS = (CONFIDENCE, HEAD, KERNEL, FEATURES, ALIGNMENT)
"""The keys whose product is `flatness/relative`."""

HEADLINE = (RELATIVE, SCALE_FREE, TRACE, MARGIN)
"""The keys that loggers have under their own names, and that the progress bar shows."""

LOGGER_GROUPS: dict[str, tuple[str, ...]] = {
    "margin_quantiles": tuple(name for name in KEYS if name.startswith("margin/q")),
    "margin_statistics": (
        "margin/std",
        "margin/skewness",
        "margin/min",
        "margin/negative",
        SCALE_FREE_MARGIN,
        CHURN,
        SOFTMAX_MARGIN,
    ),
    "relative_flatness_factors": FACTORS,
    "trace_and_margin": (ACEHT, MARGIN_BOUND, MARGIN_CORRELATION, MARGIN_SHARE),
}
"""Where loggers have the other keys: TensorBoard and W&B make a group of what stands before the first slash, and sort
the groups by the alphabet. These follow `flatness` and `margin`, which hold the headline."""

GROUPS: dict[str, tuple[str, ...]] = {"headline": HEADLINE, **LOGGER_GROUPS}
"""Names for several keys, by which they can be asked for."""

_GROUP_OF = {key: group for group, keys in LOGGER_GROUPS.items() for key in keys}
_KEY_OF = {f"{group}/{key.partition('/')[2]}": key for key, group in _GROUP_OF.items()}


def keys_of(method: str) -> tuple[str, ...]:
    """Return the names of the keys that a method gives.

    Args:
        method: name of the method, as in `Key.methods`; `"auto"`: any of them.

    Example:
        >>> keys_of("pooled")[:2]
        ('flatness/relative', 'flatness/trace')
    """
    return tuple(name for name, key in KEYS.items() if method in (*key.methods, "auto"))


def chosen_keys(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the keys that are asked for, in the order of the table.

    Args:
        names: keys, and names of `GROUPS`; None: all keys.

    Raises:
        ValueError: if there is none, or one of another name.

    Example:
        >>> chosen_keys(["headline", "flatness/confidence"])
        ('flatness/relative', 'flatness/trace', 'flatness/scale_free', 'flatness/confidence', 'margin/mean')
    """
    if names is None:
        return tuple(KEYS)
    given = [names] if isinstance(names, str) else list(names)
    if not given or (unknown := [name for name in given if name not in KEYS and name not in GROUPS]):
        raise ValueError(
            f"`keys` must name keys or groups of them; got {unknown[0] if given else given!r}. Groups are "
            f"{list(GROUPS)}; keys are {list(KEYS)}."
        )
    asked = {key for name in given for key in GROUPS.get(name, (name,))}
    return tuple(key for key in KEYS if key in asked)


def checked_name(name: str) -> str:
    """Return the name of a monitor; refuse one with which its keys would be those of the Gauss-Newton part.

    Args:
        name: the name.

    Raises:
        ValueError: if it is refused.
    """
    if name.split("/")[0] == "ggn":
        raise ValueError('`name` must not be "ggn", which ends keys of the Gauss-Newton part. Choose another one.')
    return name


def logger_key(key: str) -> str:
    """Return the name under which loggers have a key: a group of its own, unless it is one of the headline.

    Args:
        key: the key as it stands in `trainer.callback_metrics`.

    Example:
        >>> logger_key("margin/mean"), logger_key("margin/q05/train")
        ('margin/mean', 'margin_quantiles/q05/train')
    """
    prefix, _, rest = key.partition("/")
    return f"{_GROUP_OF.get(quantity(key), prefix)}/{rest}"


def key_of(name: str) -> str:
    """Return the key that loggers have under a name, the inverse of `logger_key`.

    Args:
        name: as a logger has it.

    Example:
        >>> key_of("margin_quantiles/q05/train"), key_of("val_loss")
        ('margin/q05/train', 'val_loss')
    """
    return f"{_KEY_OF.get(quantity(name), quantity(name))}{key_suffix(name)}"


def quantity(key: str) -> str:
    """Return a key without its suffix.

    Args:
        key: the key as it is logged.

    Example:
        >>> quantity("margin/mean/train/dataloader_idx_1")
        'margin/mean'
    """
    return key.removesuffix(key_suffix(key))


def key_suffix(key: str) -> str:
    """Return what follows the quantity in a key: the monitor's name and Lightning's loader index.

    Args:
        key: the key as it is logged.

    Example:
        >>> key_suffix("margin/mean/train/dataloader_idx_1")
        '/train/dataloader_idx_1'
    """
    return "".join(f"/{part}" for part in key.split("/")[2:])


def layer_key(key: str, layer: str | None, curvature: str = "hessian") -> str:
    """Return the key of a quantity of one layer, or of the whole network.

    Args:
        key: of the quantity, such as `flatness/trace`.
        layer: the layer's name; None: the network.
        curvature: `"hessian"`, or `"ggn"` for a value of the Gauss-Newton part.

    Example:
        >>> layer_key("flatness/trace", "net.conv1", "ggn"), layer_key("flatness/trace", None)
        ('flatness/trace/net.conv1/ggn', 'flatness/trace/network')
    """
    return f"{key}/{NETWORK if layer is None else layer}{'/ggn' if curvature == 'ggn' else ''}"


def keys_of_layers(layers: Sequence[str], is_whole: bool) -> list[str]:
    """Return the keys that several layers can have, each for the Hessian and for the Gauss-Newton part.

    Args:
        layers: their names.
        is_whole: whether the whole network is measured too.

    Example:
        >>> keys_of_layers(["conv"], is_whole=False)[:2]
        ['flatness/relative/conv', 'flatness/relative/conv/ggn']
    """
    pairs: list[tuple[str, str | None]] = [(key, layer) for layer in layers for key in OF_LAYER]
    pairs += [(TRACE, None)] if is_whole else []
    return [layer_key(*pair, curvature) for pair in pairs for curvature in ("hessian", "ggn")]
