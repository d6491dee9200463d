"""One run over several ranks (torch.distributed), many runs over several workers. Loaded on use only."""
