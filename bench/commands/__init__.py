"""The verbs of `sparsecert`, one module for what belongs together; torch is imported only inside them."""
