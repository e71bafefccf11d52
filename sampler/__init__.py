"""Frames worth a quantum calculation: random cells, batched molecular dynamics driven by the committee, selection."""
