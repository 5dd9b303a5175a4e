"""Tensors in, tensors out: the mathematics of pruning one matrix. Imports torch and nothing else."""
