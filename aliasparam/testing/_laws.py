"""The laws by number, and what the kit says about them."""

from __future__ import annotations

from dataclasses import dataclass, field

LAWS = {
    1: "Oracle: every name reads as if nothing were shared",
    2: "Idempotence: processing again changes nothing",
    3: "Pointer stability: no address moves, no loader is lost",
    4: "Memory: nothing grows with reloads",
    5: "Round trip: the state dict is what was loaded",
    6: "Selective = full: a partial load gives the bytes of a full one",
    7: "Fallback equivalence: with aliasing off the results are the same",
    8: "No silent garbage: a stale or half-written module refuses at its forward",
    9: "Warm = cold: a reload gives what a fresh load gives",
    10: "Atomicity: a failure leaves old weights, new weights, or a refusal",
}


class LawBroken(AssertionError):
    """A method broke a law.

    Attributes:
        law: its number, see :data:`LAWS`.
        detail: what was found.
        steps: the shortest sequence that was found to break it.
    """

    def __init__(self, method: str, law: int, detail: str, steps: list[str]) -> None:
        self.method, self.law, self.detail, self.steps = method, law, detail, list(steps)
        sequence = "\n".join(f"    {i + 1}. {step}" for i, step in enumerate(steps))
        super().__init__(f"{method} breaks law {law} ({LAWS[law]})\n  {detail}\n  after:\n{sequence}")


@dataclass
class Report:
    """What :func:`check_method` did.

    Attributes:
        unchecked: laws which were not checked, and why not.
    """

    method: str
    sequences: int = 0
    steps: int = 0
    broken: LawBroken | None = None
    unchecked: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = f"({self.sequences} sequences, {self.steps} steps)"
        if self.broken is not None:
            return f"{self.method}: {self.broken} {done}"
        if not self.unchecked:
            return f"{self.method}: all laws hold {done}"
        held = ", ".join(str(law) for law in LAWS if law not in self.unchecked)
        reasons: dict[str, list[str]] = {}
        for law, why in sorted(self.unchecked.items()):
            reasons.setdefault(why, []).append(str(law))
        rest = "; ".join(f"law {', '.join(laws)} not checked: {why}" for why, laws in reasons.items())
        return f"{self.method}: laws {held} hold {done}; {rest}"
