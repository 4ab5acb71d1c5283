"""Whether models can be merged, and how well, said before anything is merged."""
