"""Healthy counterfactuals of chest films by latent diffusion, and what they attribute (VALD-MD, arXiv 2401.01414)."""
