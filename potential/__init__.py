"""The model: neighbours, AEV, stacked committee, forces and stress, kernels, model files."""
