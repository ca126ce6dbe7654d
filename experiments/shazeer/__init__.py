"""Ablations of sparsely-gated mixtures of experts (Shazeer et al. 2017, 1701.06538)."""
