"""sra-fast: a training engine for Self-Representation Alignment (SRA, arXiv 2505.02831)."""

__version__ = "0.1.0"
