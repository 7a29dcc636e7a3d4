from aliasparam.testing import machine_for


class TestA(machine_for("cpu")):
    pass


class TestB(machine_for("cpu", aliasing=False)):
    pass
