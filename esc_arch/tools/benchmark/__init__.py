"""`basicsr benchmark`: what networks cost and how good they are, compared with the paper (arXiv 2503.06671)."""
