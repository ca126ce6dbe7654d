"""Weights of experts in eight or four bits: codes with scales, and the file that holds them."""
