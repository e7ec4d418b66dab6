"""Weights leave a run here: as safetensors, or as a diffusers pipeline that needs no package of ours."""
