"""Directional pruning (Chao et al., NeurIPS 2020): gRDA beside SGD, its theorem, and pretrained models under it."""
