"""Patients' code sets by multinomial diffusion: EHR-D3PM (arXiv 2404.12314)."""
