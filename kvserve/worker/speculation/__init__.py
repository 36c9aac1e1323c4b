"""Speculative decoding: several tokens proposed, checked by the model in one step, and kept as far
as they are what the sampler draws (Leviathan et al., 2023)."""
