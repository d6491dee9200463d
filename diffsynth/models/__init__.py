"""The networks, the attention they share, and how they are loaded."""
