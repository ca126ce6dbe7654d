"""Plans of pods: compile ahead of time, collectives, links and the roofline."""
