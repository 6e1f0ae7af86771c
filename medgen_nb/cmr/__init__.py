"""Cine cardiac MRI from phenotypes: masked autoregression with a diffusion loss (CPGG, arXiv 2505.03426)."""
