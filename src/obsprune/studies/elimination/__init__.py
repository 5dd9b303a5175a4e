"""Elimination–compensation (arXiv 2602.20467): the paper's comparisons, and what it leaves open."""
