"""12-lead diagnosis by a hierarchical transformer (arXiv 2411.00755)."""
