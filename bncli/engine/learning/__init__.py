"""Training of gamma and beta by backpropagation."""
