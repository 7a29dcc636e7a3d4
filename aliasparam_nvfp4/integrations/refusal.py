"""Whether an engine's step failed because the model refuses to run: such a step fails its requests, and not the engine."""

from __future__ import annotations

from aliasparam.errors import StateError

#: What the text of a refusal that a worker sends begins with, and what torch.compile says where it meets one while it traces.
SENT, _TRACED = "aliasparam_nvfp4 refused: ", "a kernel-format name is open"


def is_refusal(error: BaseException | None) -> bool:
    """Whether the model refused to run; what went wrong otherwise is the engine's to judge."""
    while error is not None:
        if isinstance(error, StateError) or SENT in str(error) or _TRACED in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
