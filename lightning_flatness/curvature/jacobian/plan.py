"""Where a record uses each parameter, and behind which layers it is piecewise linear."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from lightning_flatness.recording.first_samples import is_by_sample
from lightning_flatness.recording.graph import Cut, is_overwritten, sharing_memory
from lightning_flatness.recording.operation import Captured, Node, Operation, named_arguments
from lightning_flatness.recording.operators import Trait
from lightning_flatness.recording.recorded_layers import RecordedLayers

Role = Literal["weight", "bias", "scale", "copy"]
_CONVOLUTIONS = ("convolution", "conv1d", "conv2d", "conv3d")
_BATCH_NORMS = ("batch_norm", "cudnn_batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training")
_NORMS = (*_BATCH_NORMS, "layer_norm", "native_layer_norm", "group_norm", "native_group_norm")
# Operator -> the argument that carries the data, and what the others are to it.
_ROLES: dict[str, tuple[str, dict[str, Role]]] = {
    **dict.fromkeys(_CONVOLUTIONS, ("input", {"weight": "weight", "bias": "bias"})),
    **dict.fromkeys(_NORMS, ("input", {"weight": "scale", "bias": "bias"})),
    "linear": ("input", {"weight": "weight", "bias": "bias"}),
    "addmm": ("mat1", {"mat2": "weight", "self": "bias"}),
    "mm": ("self", {"mat2": "weight"}),
}
_BROADCAST = ("add", "sub", "rsub", "mul", "div", "prelu", "_prelu_kernel")
_EXPANSIONS = ("expand", "repeat")
# Where there are as many numbers as before, these are the same ones, in the same order.
_COPIES = (
    *("_to_copy", "alias", "clone", "contiguous", "detach", "expand", "flatten", "narrow", "reshape", "select"),
    *("slice", "squeeze", "to", "unflatten", "_unsafe_view", "unsqueeze", "view"),
)


class Use(NamedTuple):
    """One use of a parameter by an operation on data.

    Attributes:
        parameter: its name.
        role: what it is to the operation; a copy shifts or scales each sample, or is taken along by it.
        argument: its name among the arguments of the operation.
        node: the argument, the parameter or what was made of it.
    """

    parameter: str
    role: Role
    argument: str
    node: int


class Plan:
    """What is to be differentiated for the parameters of a record.

    Args:
        recorded: one pass.
        cut: where the network ends.
        samples: n, their number.

    Attributes:
        numbers: the operations from the parameters to the cut, in order.
        uses: of the parameters, by the number of the operation.
        kinds: what kind of operation that is, by its number.
        left_out: why a parameter is not covered, by its name.
        overwritten: numbers of those operations whose result is changed in place later.
        ends: numbers of operations whose result is all that later ones depend on of the data so far.
        keeps_samples_apart: whether each operation on data is known to have a row for each sample, which depends on
            the same row of the data before it alone.
    """

    def __init__(self, recorded: RecordedLayers, cut: Cut, samples: int) -> None:
        """Go through the record once."""
        self._recorded, self._samples = recorded, samples
        self.numbers = recorded.graph.ancestry(cut.node)
        self.uses: dict[int, list[Use]] = {}
        self.kinds: dict[int, Literal["layer", "norm", "broadcast", "expansion"]] = {}
        self.left_out: dict[str, str] = {}
        self._made_of = {node: frozenset([name]) for name, node in recorded.parameters.items()}
        self._is_copy = set(self._made_of)
        self._is_transposed: set[int] = set()  # of matrices that are such copies
        self._turned: set[str] = set()  # matrices whose columns are the outputs
        for number in self.numbers:
            operation = recorded.graph.operations[number]
            if sources := [node.index for node in operation.nodes if node.index in self._made_of]:
                self._note(number, operation, sources)
        for name in recorded.parameters:
            uses = self.uses_of(name)
            roles = {use.role == "weight" for use in uses}
            if name in self._turned and (len(uses) > 1 or name in recorded.layers.values()):
                self.left_out[name] = "its columns are the outputs of a layer"
            elif len(roles) != 1:
                self.left_out.setdefault(name, "it is used in several ways" if roles else "its use is not recorded")
        graph = recorded.graph
        self.overwritten = {n for n in self.uses if is_overwritten(graph, graph.operations[n].results[0], n)}
        self.ends = self._found_ends()
        steps = (graph.operations[number] for number in self.numbers)
        self.keeps_samples_apart = all(step.results[0] in self._made_of or self._is_apart(step) for step in steps)

    def is_made(self, node: int) -> bool:
        """Return whether a node is made of parameters and constants alone."""
        return node in self._made_of

    def is_weight(self, name: str) -> bool:
        """Return whether a parameter is covered, and the weight of layers alone."""
        return name not in self.left_out and any(use.role == "weight" for use in self.uses_of(name))

    def uses_of(self, name: str) -> list[Use]:
        """Return the uses of a parameter, in order."""
        return [use for uses in self.uses.values() for use in uses if use.parameter == name]

    def is_exact(self, name: str) -> bool:
        """Return whether the network is piecewise linear in a parameter, up to the cut."""
        graph, reached = self._recorded.graph, {self._recorded.parameters[name]}
        nodes = [node for number in self.numbers for node in graph.operations[number].results]
        for number in self.numbers:
            operation = graph.operations[number]
            if dependent := [node for node in operation.nodes if node.index in reached]:
                if not _is_linear(operation, dependent):
                    return False
                reached.update(operation.results)
                if operation.function._schema.is_mutable:  # through a view of what others read
                    reached.update(sharing_memory(graph, operation.results, nodes))
        return True

    def _found_ends(self) -> set[int]:
        """Return where the network can be differentiated in parts, one after the other."""
        graph, ends, alive = self._recorded.graph, set(), set[int]()
        last_use = {node.index: number for number in self.numbers for node in graph.operations[number].nodes}
        for number in self.numbers:
            results = graph.operations[number].results
            alive |= {node for node in results if node not in self._made_of}
            alive = {node for node in alive if last_use.get(node, -1) > number}
            if alive == {results[0]} and not is_overwritten(graph, results[0], number):
                ends.add(number)
        return ends

    def _note(self, number: int, operation: Operation, sources: list[int]) -> None:
        name = operation.name.rstrip("_") if operation.name not in _ROLES else operation.name
        named = named_arguments(operation.function, operation.args, operation.kwargs)
        data, roles = _ROLES.get(name, (None, {}))
        if data is not None and self._is_plain(named) and not self._is_made(named[data]):
            kind: Any = "norm" if name in _NORMS else "layer"
            self._add(number, kind, named, {a: role for a, role in roles.items() if self._is_made(named.get(a))})
        elif name in _EXPANSIONS and self._is_by_sample(operation) and not self._is_many(sources[0]):
            self._add(number, "expansion", named, {"self": "copy"})
        elif name in _BROADCAST and any(self._carries_data(argument) for argument in operation.args):
            self._add(number, "broadcast", named, {a: "copy" for a, value in named.items() if self._is_made(value)})
        elif len(sources) == len(operation.nodes) and not any(map(self._carries_data, operation.captured)):
            made_of = frozenset().union(*(self._made_of[node] for node in sources))
            self._made_of.update(dict.fromkeys(operation.results, made_of))
            self._note_copy(name, sources[0], operation.results[0])
            return
        for node in sources:
            if node not in {use.node for use in self.uses.get(number, ())}:
                reason = f"`{operation.name}` uses it in a way that is not covered"
                self.left_out.update(dict.fromkeys(self._made_of[node], reason))

    def _add(self, number: int, kind: Any, named: dict[str, Any], roles: dict[str, Role]) -> None:
        uses = []
        for argument, role in roles.items():
            node = named[argument].index
            is_turned = node in self._is_transposed
            if role == "weight" and argument == "mat2" and node in self._is_copy:  # a matrix of its own, from the left
                self._turned.update(self._made_of[node])
                is_turned = True
            if is_turned if argument == "mat2" else node in self._is_copy:
                (name,) = self._made_of[node]
                uses.append(Use(name, role, argument, node))
        if uses:
            self.uses[number], self.kinds[number] = uses, kind

    def _note_copy(self, name: str, source: int, result: int) -> None:
        shapes = [self._recorded.graph.tensor_of(node).shape for node in (source, result)]
        if name in ("t", "transpose") and len(shapes[0]) == 2 and shapes[1] == shapes[0][::-1]:
            into = self._is_transposed if source in self._is_copy else self._is_copy
        else:
            into = self._is_copy if source in self._is_copy else self._is_transposed
            if name not in _COPIES or shapes[0].numel() != shapes[1].numel():
                return
            if source in self._is_transposed and shapes[0] != shapes[1]:
                return
        if source in self._is_copy or source in self._is_transposed:
            into.add(result)

    def _is_plain(self, named: dict[str, Any]) -> bool:
        """Return whether an operation is a layer as it should be: not transposed, and its parts added as they are."""
        return not named.get("transposed") and named.get("alpha", 1) == named.get("beta", 1) == 1

    def _is_apart(self, operation: Operation) -> bool:
        """Return whether row i of the result depends on row i of the data alone."""
        graph, n = self._recorded.graph, self._samples
        if operation.name not in _ROLES:
            return is_by_sample(graph, operation, n, self._made_of)
        named = named_arguments(operation.function, operation.args, operation.kwargs)
        x = named[_ROLES[operation.name][0]]
        if any(node.index not in self._made_of and node != x for node in operation.nodes):
            return False
        before = (graph.tensor_of(x.index) if isinstance(x, Node) else graph.captures.peek(x.index)).shape
        after = graph.tensor_of(operation.results[0]).shape
        spatial = named["stride"] if operation.name in _CONVOLUTIONS else ()
        own = len(before) - len(named.get("normalized_shape", ()))  # dimensions that are not normalised together
        return before[:1] == after[:1] == (n,) and len(before) == len(after) > max(1, 1 + len(spatial)) and own > 0

    def _is_made(self, argument: Any) -> bool:
        return isinstance(argument, Node) and argument.index in self._made_of

    def _is_by_sample(self, operation: Operation) -> bool:
        return self._recorded.graph.tensor_of(operation.results[0]).shape[:1] == (self._samples,)

    def _is_many(self, node: int) -> bool:
        """Return whether a tensor has rows of its own in the place of samples."""
        return self._samples > 1 and self._recorded.graph.tensor_of(node).shape[:1] == (self._samples,)

    def _carries_data(self, argument: Any) -> bool:
        """Return whether an argument is not made of parameters and constants alone."""
        if isinstance(argument, Captured):
            shape = self._recorded.graph.captures.peek(argument.index).shape
            return argument.index not in self._recorded.state and len(shape) > 0 and shape[0] % self._samples == 0
        return isinstance(argument, Node) and argument.index not in self._made_of


def _is_linear(operation: Operation, dependent: list[Node]) -> bool:
    """Return whether an operation is piecewise linear in some of its arguments together."""
    name, known = operation.name, operation.traits
    if name in _NORMS:
        named = named_arguments(operation.function, operation.args, operation.kwargs)
        return len(dependent) == 1 and (name in _BATCH_NORMS or named["input"] not in dependent)
    if Trait.LINEAR_IN_FIRST in known:
        return len(dependent) == 1 and operation.args[0] in dependent
    if Trait.LINEAR_IN_EACH in known or Trait.MATRIX_PRODUCT in known or name in _CONVOLUTIONS:
        return len(dependent) == 1
    return Trait.PIECEWISE_LINEAR in known or name in ("repeat", "expand_as")
