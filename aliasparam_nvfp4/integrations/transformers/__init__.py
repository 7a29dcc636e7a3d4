"""transformers: importing this package lets ``from_pretrained`` load ModelOpt NVFP4 checkpoints, dense and MoE."""

from __future__ import annotations

from .delta import apply_delta_folder as apply_delta_folder
from .experts import Experts as Experts
from .load import answer as answer
from .load import load_model as load_model
from .load import logits as logits
from .quantizer import CompressedTensorsConfig as CompressedTensorsConfig
from .quantizer import ModelOptConfig as ModelOptConfig
from .quantizer import ModelOptQuantizer as ModelOptQuantizer
from .quantizer import compressed_tensors_here as compressed_tensors_here
from .quantizer import register as register
from .quantizer import use_backend as use_backend
from .reload import reload_folder as reload_folder

register()
