"""sparsecert: train, prune, attack, certify and rank sparse image classifiers."""
