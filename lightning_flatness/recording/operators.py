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
        BY_SAMPLE: row i of its result depends on row i of its arguments alone, in the same way for every i, if all of
            these have a row for each sample; of a mean or a sum over other dimensions.
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
    BY_SAMPLE = auto()


_LINEAR, _EACH, _CURVED = Trait.PIECEWISE_LINEAR, Trait.LINEAR_IN_EACH, Trait.POINTWISE
_ROWS = Trait.BY_SAMPLE
_SAME, _PRODUCT, _MEAN = Trait.SAME_FOR_EACH_SAMPLE, Trait.MATRIX_PRODUCT, Trait.GLOBAL_MEAN

OPERATORS: dict[str, Trait] = {
    # Activations.
    "abs": _LINEAR | _ROWS,
    "clamp": _LINEAR | _ROWS,
    "clamp_max": _LINEAR | _ROWS,
    "clamp_min": _LINEAR | _ROWS,
    "hardsigmoid": _LINEAR | _ROWS,
    "hardtanh": _LINEAR | _ROWS,
    "leaky_relu": _LINEAR | _ROWS,
    "_prelu_kernel": _LINEAR | _ROWS,
    "prelu": _LINEAR | _ROWS,
    "relu": _LINEAR | _ROWS,
    "relu6": _LINEAR | _ROWS,
    "rrelu": _LINEAR,
    "rrelu_with_noise": _LINEAR,
    "threshold": _LINEAR | _ROWS,
    "celu": _CURVED | _ROWS,
    "cos": _CURVED | _ROWS,
    "elu": _CURVED | _ROWS,
    "erf": _CURVED | _ROWS,
    "exp": _CURVED | _ROWS,
    "expm1": _CURVED | _ROWS,
    "gelu": _CURVED | _ROWS,
    "hardshrink": _CURVED | _ROWS,
    "hardswish": _CURVED | _ROWS,
    "log": _CURVED | _ROWS,
    "log1p": _CURVED | _ROWS,
    "log_sigmoid_forward": _CURVED | _ROWS,
    "mish": _CURVED | _ROWS,
    "pow": _CURVED | _ROWS,
    "reciprocal": _CURVED | _ROWS,
    "rsqrt": _CURVED | _ROWS,
    "selu": _CURVED | _ROWS,
    "sigmoid": _CURVED | _ROWS,
    "silu": _CURVED | _ROWS,
    "sin": _CURVED | _ROWS,
    "softplus": _CURVED | _ROWS,
    "softshrink": _CURVED | _ROWS,
    "sqrt": _CURVED | _ROWS,
    "square": _CURVED | _ROWS,
    "tanh": _CURVED | _ROWS,
    # Arithmetic.
    "add": _LINEAR | _SAME | _ROWS,
    "rsub": _LINEAR | _SAME | _ROWS,
    "sub": _LINEAR | _SAME | _ROWS,
    "neg": _LINEAR | _ROWS,
    "mul": _EACH | _ROWS,
    "max": _EACH,
    "maximum": _EACH | _ROWS,
    "min": _EACH,
    "minimum": _EACH | _ROWS,
    "where": _EACH | _ROWS,
    "div": Trait.LINEAR_IN_FIRST | _ROWS,
    # Layers.
    "addmm": _EACH | _SAME | _PRODUCT,
    "baddbmm": _PRODUCT,
    "bmm": _PRODUCT,
    "convolution": _EACH | _PRODUCT,
    "einsum": _PRODUCT,
    "linear": _EACH | _SAME | _PRODUCT,
    "matmul": _PRODUCT,
    "mm": _EACH | _SAME | _PRODUCT,
    "batch_norm": _LINEAR | _ROWS,
    "cudnn_batch_norm": _LINEAR | _ROWS,
    "miopen_batch_norm": _LINEAR | _ROWS,
    "native_batch_norm": _LINEAR | _ROWS,
    "_native_batch_norm_legit_no_training": _LINEAR | _ROWS,
    "dropout": _LINEAR | _ROWS,
    "feature_dropout": _LINEAR | _ROWS,
    # Pooling and sums.
    "adaptive_avg_pool1d": _LINEAR | _MEAN | _ROWS,
    "adaptive_avg_pool2d": _LINEAR | _MEAN | _ROWS,
    "adaptive_avg_pool3d": _LINEAR | _MEAN | _ROWS,
    "_adaptive_avg_pool2d": _LINEAR | _ROWS,
    "_adaptive_avg_pool3d": _LINEAR | _ROWS,
    "mkldnn_adaptive_avg_pool2d": _LINEAR | _ROWS,
    "adaptive_max_pool1d": _LINEAR | _ROWS,
    "adaptive_max_pool2d": _LINEAR | _ROWS,
    "adaptive_max_pool3d": _LINEAR | _ROWS,
    "avg_pool1d": _LINEAR | _ROWS,
    "avg_pool2d": _LINEAR | _ROWS,
    "avg_pool3d": _LINEAR | _ROWS,
    "max_pool1d": _LINEAR | _ROWS,
    "max_pool1d_with_indices": _LINEAR | _ROWS,
    "max_pool2d": _LINEAR | _ROWS,
    "max_pool2d_with_indices": _LINEAR | _ROWS,
    "max_pool3d": _LINEAR | _ROWS,
    "max_pool3d_with_indices": _LINEAR | _ROWS,
    "amax": _LINEAR | _ROWS,
    "amin": _LINEAR | _ROWS,
    "mean": _LINEAR | _ROWS,
    "sum": _LINEAR | _ROWS,
    # Shapes, parts and copies.
    "alias": _LINEAR | _ROWS,
    "cat": _LINEAR | _SAME | Trait.JOINS | _ROWS,
    "channel_shuffle": _LINEAR,
    "chunk": _LINEAR,
    "clone": _LINEAR | _ROWS,
    "constant_pad_nd": _LINEAR,
    "contiguous": _LINEAR | _ROWS,
    "copy": _LINEAR | _ROWS,
    "detach": _LINEAR | _ROWS,
    "expand": _LINEAR,
    "flatten": _LINEAR | _ROWS,
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
    "reshape": _LINEAR | _ROWS,
    "select": _LINEAR,
    "slice": _LINEAR,
    "split": _LINEAR,
    "split_with_sizes": _LINEAR,
    "squeeze": _LINEAR | _ROWS,
    "stack": _LINEAR | Trait.JOINS,
    "t": _LINEAR,
    "_to_copy": _LINEAR | _ROWS,
    "to": _LINEAR | _ROWS,
    "transpose": _LINEAR,
    "unbind": _LINEAR,
    "unflatten": _LINEAR,
    "_unsafe_view": _LINEAR | _ROWS,
    "unsqueeze": _LINEAR,
    "view": _LINEAR | _ROWS,
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
