"""How one linear module is quantized, whichever tool said so in whichever words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Where the scale of activations is from: the file, or the whole input, each token, or each block of a token at run time.
Inputs = Literal["stored", "tensor", "token", "block"]
#: Values of a block of activations, and rows and columns of one of FP8 weights where nothing else is said.
FP8_BLOCK = 128


@dataclass(frozen=True)
class Scheme:
    """Attributes:
    algo: ModelOpt's name: "NVFP4", "W4A16_NVFP4" or "FP8".
    inputs: how activations are quantized; None where they are left as they are.
    block: (rows, columns) of the FP8 weights that have one scale, where the config says.
    """

    algo: str
    inputs: Inputs | None
    block: tuple[int, int] | None = None

    @property
    def is_fp4(self) -> bool:
        return self.algo != "FP8"


NVFP4 = Scheme("NVFP4", "stored")
W4A16 = Scheme("W4A16_NVFP4", None)
FP8 = Scheme("FP8", "stored")

#: ModelOpt's names of a module's algorithm (``export/quant_utils.py``, ``process_layer_quant_config``).
BY_ALGO = {
    "NVFP4": NVFP4,
    "NVFP4_AWQ": NVFP4,  # whether input features have factors of their own the files say: others were folded elsewhere
    "W4A16_NVFP4": W4A16,
    "FP8": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("FP8", "token"),
    "FP8_PB_WO": Scheme("FP8", None),
}


def fitting(schemes: Sequence[Scheme], *, fp4: bool | None = None, stored: bool | None = None) -> Scheme | None:
    """Of what a config says of one module, by precedence, the first that the file's tensors can be.

    Args:
        schemes: the candidates.
        fp4: whether the file's weight is packed (True), in FP8 (False), or not known (None).
        stored: whether the file has a scale of the activations; None where that is not known.
    """
    possible = [scheme for scheme in schemes if fp4 is None or scheme.is_fp4 is fp4] or list(schemes)
    wanted = [scheme for scheme in possible if stored is not False or scheme.inputs != "stored"]
    return next(iter(wanted or possible), None)
