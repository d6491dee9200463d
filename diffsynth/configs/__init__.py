"""What checkpoints are known: file layout, model arguments, model ids."""
