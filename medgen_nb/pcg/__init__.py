"""Heart sounds from clinical metadata by latent diffusion (H-LDM, arXiv 2511.14312)."""
