"""How a run gets onto a cluster: SLURM jobs, their supervision, the planner, scaling studies, what a machine lacks."""
