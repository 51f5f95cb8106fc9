"""`basicsr benchmark`: what networks cost and how good they are, beside the paper's figures (arXiv 2503.06671)."""
