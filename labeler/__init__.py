"""Reference energies, forces and stresses for frames, by real quantum codes. Knows no machine-learned model."""
