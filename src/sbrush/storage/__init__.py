"""Files that are written completely or not at all: JSON, checkpoints, shards of tensors."""
