"""Analysis of trained models: load, specialisation of experts, figures, and the report of a run."""
