"""Ablations of DeepSeekMoE (2401.06066) and loss-free balancing (2408.15664)."""
