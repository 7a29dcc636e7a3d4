"""Engines, one folder each; the only files that import an engine."""
