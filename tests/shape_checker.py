"""The type checker of shape annotations: beartype, with a random generator of its own.

Beartype checks one random item of a list. Taken from Python's global generator, that draw would change the state that
the neutrality tests compare.
"""

from __future__ import annotations

import random
from unittest import mock

with mock.patch("random.getrandbits", random.Random(0).getrandbits):
    from beartype import beartype

__all__ = ["beartype"]
