"""Checkpoint folders: what they hold, how it is quantized, and whether it fits."""

from __future__ import annotations

from .errors import CheckpointError as CheckpointError
from .errors import UnsupportedFormatError as UnsupportedFormatError
from .experts import ExpertTensorName as ExpertTensorName
from .experts import ExpertTensors as ExpertTensors
from .experts import expert_layers as expert_layers
from .folder import WHOLE as WHOLE
from .folder import CheckpointFolder as CheckpointFolder
from .folder import TensorEntry as TensorEntry
from .quant_config import QuantConfig as QuantConfig
from .rules import Quantization as Quantization
from .scheme import Scheme as Scheme
from .validate import check_tensors as check_tensors
from .validate import fits as fits
