"""NVFP4 numbers: codes, block scales, global scales."""
