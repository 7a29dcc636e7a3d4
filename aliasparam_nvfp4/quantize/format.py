"""The numbers of NVFP4.

A value is ``e2m1 code * block scale (e4m3) * global scale (f32)``; a block is 16 values along K. Two codes share a byte, the
even column in the low nibble (ModelOpt ``modelopt/torch/quantization/qtensor/nvfp4_tensor.py``, ``NVFP4QTensor.quantize``).

Global scales point two ways. ModelOpt stores multipliers: ``weight_scale_2 = amax / (6 * 448)``, ``input_scale`` likewise.
FlashInfer's quantizers and compressed-tensors take the reciprocal, ``448 * 6 / amax``.
"""

from __future__ import annotations

from typing import Final

#: Values along K which share one block scale.
BLOCK_SIZE: Final = 16
#: Magnitudes of the codes 0..7; bit 3 is the sign, so code 8 is -0.
E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0
#: Smallest positive e4m3 value, the floor of a block scale.
E4M3_TINY: Final = 2.0**-9
