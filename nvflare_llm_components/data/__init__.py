"""Instruction data: preparation, partition over sites, and the demo's generated sets and model."""
