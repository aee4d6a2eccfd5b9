from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lightning_flatness.data.randomness import Randomness

GLOBAL = np.random.default_rng(1)


def helped() -> float:
    return GLOBAL.random()


class Holds:
    """Draws from a generator that it has as an attribute, somewhere."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def draw(self) -> float:
        return self.make()


class ReadsAGlobal:
    def draw(self) -> float:
        return helped()


def closing_over(generator: np.random.Generator) -> Any:
    return lambda: generator.random()


def holders() -> dict[str, Any]:
    of_numpy, of_torch, of_python = np.random.default_rng(2), torch.Generator().manual_seed(3), random.Random(4)
    old = np.random.RandomState(5)
    return {
        "the global one of torch": Holds(make=lambda: float(torch.rand(()))),
        "the global one of NumPy": Holds(make=lambda: np.random.rand()),
        "the global one of Python": Holds(make=lambda: random.random()),
        "NumPy's": Holds(generator=of_numpy, make=of_numpy.random),
        "NumPy's old one": Holds(state=[{"rng": old}], make=old.rand),
        "torch's": Holds(nested=Holds(deep=(of_torch,)), make=lambda: float(torch.rand((), generator=of_torch))),
        "Python's": Holds(make=of_python.random),
        "of a closure": Holds(make=closing_over(np.random.default_rng(6))),
        "of a partial": Holds(make=partial(closing_over(np.random.default_rng(7)))),
        "of a method": Holds(make=Holds(make=old.rand, of=old).draw),
        "of a module": ReadsAGlobal(),
    }


each_holder = pytest.mark.parametrize("name", holders())


@each_holder
def test_drawn_numbers_depend_on_the_key_and_are_not_missed_afterwards(name: str) -> None:
    used, untouched = holders()[name], holders()[name]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = GLOBAL.bit_generator.state
    expected = [untouched.draw() for _ in range(3)]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    GLOBAL.bit_generator.state = before
    first, randomness = used.draw(), Randomness(used)
    drawn = []
    with randomness.preserved():
        for key in (7, 8, 7):
            randomness.seed(key)
            drawn.append([used.draw(), used.draw()])
    assert drawn[0] == drawn[2] != drawn[1]
    assert [first, used.draw(), used.draw()] == expected


def test_an_error_leaves_the_generators_as_they_were() -> None:
    holder = Holds(generator=np.random.default_rng(2))
    randomness, state = Randomness(holder), holder.generator.bit_generator.state
    python, of_torch = random.getstate(), torch.get_rng_state()

    def fail() -> None:
        with randomness.preserved():
            randomness.seed(0)
            raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        fail()
    assert holder.generator.bit_generator.state == state
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), of_torch)


def test_what_cannot_be_looked_into_is_left_alone() -> None:
    loop: list[Any] = [random.SystemRandom(), range(3), iter([]), object(), int, torch]
    loop.append(loop)
    many = [random.Random(i) for i in range(300)]
    states = [each.getstate() for each in many]
    randomness = Randomness([loop, many])
    with randomness.preserved():
        randomness.seed(0)
    assert [each.getstate() for each in many] == states
