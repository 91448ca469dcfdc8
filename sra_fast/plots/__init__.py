"""Pictures: loss curves, image grids, probe curves, PCA maps."""
