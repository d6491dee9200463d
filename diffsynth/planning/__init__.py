"""What a run takes, and which settings fit into the memory at hand."""
