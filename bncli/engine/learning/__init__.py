"""Learning gamma and beta by backpropagation."""
