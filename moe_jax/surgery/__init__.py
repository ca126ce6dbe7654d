"""Changes of a trained model's experts: upcycle, prune, merge and grow, as pure functions."""
