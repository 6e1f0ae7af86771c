"""Cine cardiac MRI from 82 phenotypes (arXiv 2505.03426)."""
