"""Triton kernels that read kernel-format bytes."""
