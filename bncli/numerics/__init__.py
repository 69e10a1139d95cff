"""Arrays in, arrays out: the arithmetic of statistics, normalization and learning, and its compiled kernels."""
