"""The only code that knows transformers: checkpoints, blocks, matrices, tokens, and the walk through a model."""
