"""Helpers without knowledge of training: registries, atomic files, CUDA graphs."""
