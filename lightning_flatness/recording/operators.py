"""What is known about torch's operators: one table, a row for each operator with its traits."""

from __future__ import annotations

from enum import Flag, auto


class Trait(Flag):
    """Properties of an operator, as a function of those of its arguments that depend on the graph's inputs.

    Attributes:
        PIECEWISE_LINEAR: its second derivative is zero almost everywhere.
        LINEAR_IN_EACH: piecewise linear as long as only one of its arguments depends on the inputs.
        LINEAR_IN_FIRST: piecewise linear as long as only its first argument depends on the inputs.
        POINTWISE: curved, but which number reaches which does not depend on the values.
        SAME_FOR_EACH_SAMPLE: a captured tensor with one row per sample shifts each sample, stands beside it or is a
            layer's weight; it cannot connect filters in one sample and not in another.
        JOINS: each number of its result is one of its arguments' numbers, and which one is the same for all values.
        MATRIX_PRODUCT: a linear layer, or what one is made of.
        LOG_SOFTMAX: its first argument is read as logits.
        GLOBAL_MEAN: the mean over all positions when its output size is 1.
        READS_NUMBER: hands a number of a tensor to Python.
    """

    NONE = 0
    PIECEWISE_LINEAR = auto()
    LINEAR_IN_EACH = auto()
    LINEAR_IN_FIRST = auto()
    POINTWISE = auto()
    SAME_FOR_EACH_SAMPLE = auto()
    JOINS = auto()
    MATRIX_PRODUCT = auto()
    LOG_SOFTMAX = auto()
    GLOBAL_MEAN = auto()
    READS_NUMBER = auto()


_LINEAR, _EACH, _CURVED = Trait.PIECEWISE_LINEAR, Trait.LINEAR_IN_EACH, Trait.POINTWISE
_SAME, _PRODUCT, _MEAN = Trait.SAME_FOR_EACH_SAMPLE, Trait.MATRIX_PRODUCT, Trait.GLOBAL_MEAN

OPERATORS: dict[str, Trait] = {
    # Activations.
    "abs": _LINEAR,
    "clamp": _LINEAR,
    "clamp_max": _LINEAR,
    "clamp_min": _LINEAR,
    "hardsigmoid": _LINEAR,
    "hardtanh": _LINEAR,
    "leaky_relu": _LINEAR,
    "_prelu_kernel": _LINEAR,
    "prelu": _LINEAR,
    "relu": _LINEAR,
    "relu6": _LINEAR,
    "rrelu": _LINEAR,
    "rrelu_with_noise": _LINEAR,
    "threshold": _LINEAR,
    "celu": _CURVED,
    "cos": _CURVED,
    "elu": _CURVED,
    "erf": _CURVED,
    "exp": _CURVED,
    "expm1": _CURVED,
    "gelu": _CURVED,
    "hardshrink": _CURVED,
    "hardswish": _CURVED,
    "log": _CURVED,
    "log1p": _CURVED,
    "log_sigmoid_forward": _CURVED,
    "mish": _CURVED,
    "pow": _CURVED,
    "reciprocal": _CURVED,
    "rsqrt": _CURVED,
    "selu": _CURVED,
    "sigmoid": _CURVED,
    "silu": _CURVED,
    "sin": _CURVED,
    "softplus": _CURVED,
    "softshrink": _CURVED,
    "sqrt": _CURVED,
    "square": _CURVED,
    "tanh": _CURVED,
    # Arithmetic.
    "add": _LINEAR | _SAME,
    "rsub": _LINEAR | _SAME,
    "sub": _LINEAR | _SAME,
    "neg": _LINEAR,
    "mul": _EACH,
    "max": _EACH,
    "maximum": _EACH,
    "min": _EACH,
    "minimum": _EACH,
    "where": _EACH,
    "div": Trait.LINEAR_IN_FIRST,
    # Layers.
    "addmm": _EACH | _SAME | _PRODUCT,
    "baddbmm": _PRODUCT,
    "bmm": _PRODUCT,
    "convolution": _EACH | _PRODUCT,
    "einsum": _PRODUCT,
    "linear": _EACH | _SAME | _PRODUCT,
    "matmul": _PRODUCT,
    "mm": _EACH | _SAME | _PRODUCT,
    "batch_norm": _LINEAR,
    "cudnn_batch_norm": _LINEAR,
    "miopen_batch_norm": _LINEAR,
    "native_batch_norm": _LINEAR,
    "_native_batch_norm_legit_no_training": _LINEAR,
    "dropout": _LINEAR,
    "feature_dropout": _LINEAR,
    # Pooling and sums.
    "adaptive_avg_pool1d": _LINEAR | _MEAN,
    "adaptive_avg_pool2d": _LINEAR | _MEAN,
    "adaptive_avg_pool3d": _LINEAR | _MEAN,
    "_adaptive_avg_pool2d": _LINEAR,
    "_adaptive_avg_pool3d": _LINEAR,
    "mkldnn_adaptive_avg_pool2d": _LINEAR,
    "adaptive_max_pool1d": _LINEAR,
    "adaptive_max_pool2d": _LINEAR,
    "adaptive_max_pool3d": _LINEAR,
    "avg_pool1d": _LINEAR,
    "avg_pool2d": _LINEAR,
    "avg_pool3d": _LINEAR,
    "max_pool1d": _LINEAR,
    "max_pool1d_with_indices": _LINEAR,
    "max_pool2d": _LINEAR,
    "max_pool2d_with_indices": _LINEAR,
    "max_pool3d": _LINEAR,
    "max_pool3d_with_indices": _LINEAR,
    "amax": _LINEAR,
    "amin": _LINEAR,
    "mean": _LINEAR,
    "sum": _LINEAR,
    # Shapes, parts and copies.
    "alias": _LINEAR,
    "cat": _LINEAR | _SAME | Trait.JOINS,
    "channel_shuffle": _LINEAR,
    "chunk": _LINEAR,
    "clone": _LINEAR,
    "constant_pad_nd": _LINEAR,
    "contiguous": _LINEAR,
    "copy": _LINEAR,
    "detach": _LINEAR,
    "expand": _LINEAR,
    "flatten": _LINEAR,
    "index_select": _LINEAR,
    "narrow": _LINEAR,
    "native_channel_shuffle": _LINEAR,
    "pad": _LINEAR,
    "permute": _LINEAR,
    "pixel_shuffle": _LINEAR,
    "pixel_unshuffle": _LINEAR,
    "reflection_pad1d": _LINEAR,
    "reflection_pad2d": _LINEAR,
    "reflection_pad3d": _LINEAR,
    "replication_pad1d": _LINEAR,
    "replication_pad2d": _LINEAR,
    "replication_pad3d": _LINEAR,
    "reshape": _LINEAR,
    "select": _LINEAR,
    "slice": _LINEAR,
    "split": _LINEAR,
    "split_with_sizes": _LINEAR,
    "squeeze": _LINEAR,
    "stack": _LINEAR | Trait.JOINS,
    "t": _LINEAR,
    "_to_copy": _LINEAR,
    "to": _LINEAR,
    "transpose": _LINEAR,
    "unbind": _LINEAR,
    "unflatten": _LINEAR,
    "_unsafe_view": _LINEAR,
    "unsqueeze": _LINEAR,
    "view": _LINEAR,
    # Losses, and what leaves the graph.
    "cross_entropy_loss": Trait.LOG_SOFTMAX,
    "_log_softmax": Trait.LOG_SOFTMAX,
    "log_softmax": Trait.LOG_SOFTMAX,
    "item": Trait.READS_NUMBER,
    "_local_scalar_dense": Trait.READS_NUMBER,
}
"""Traits by the operator's plain name, without the underscore of its in-place variant."""


CONVOLUTIONS = frozenset({"convolution", "conv1d", "conv2d", "conv3d"})
"""Names of the operators that convolve; `convolution` may be transposed."""
TRANSPOSED_CONVOLUTIONS = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
"""Names that transposed convolutions have in inference mode."""


def traits(name: str) -> Trait:
    """Return the traits of an operator; none for one that is not in the table.

    Args:
        name: plain name, as `relu` or `relu_`.

    Example:
        >>> Trait.PIECEWISE_LINEAR in traits("relu_"), traits("svd")
        (True, <Trait.NONE: 0>)
    """
    return OPERATORS.get(name.rstrip("_"), Trait.NONE)
