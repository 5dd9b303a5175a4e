"""Moves data to solvers and answers home; decides nothing numerical."""
