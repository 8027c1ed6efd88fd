"""Pure tensor functions: the operators of MoRA, their gradients, their deltas."""
