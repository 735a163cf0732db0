"""Files that are there whole or not at all: JSON, checkpoints, shards of tensors. Knows nothing of models."""
