"""Analyses of trained models: features, linear probes, PCA maps, studies."""
