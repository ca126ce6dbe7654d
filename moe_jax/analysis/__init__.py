"""What a trained model does: load, specialisation, and the report of a run."""
