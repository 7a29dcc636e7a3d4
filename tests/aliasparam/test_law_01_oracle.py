"""Law 1 (and 2, 3, 5, 6, 8, 9 on the way): any operations on any layer, against a model in which nothing is shared."""

from __future__ import annotations

from aliasparam.testing import machine_for


class TestMachine_law_1_any_sequence(machine_for("cpu")):
    pass


class TestMachine_law_7_any_sequence_without_aliasing(machine_for("cpu", aliasing=False)):
    pass
