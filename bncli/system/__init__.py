"""What the operating system is asked for: how an output comes into being, and what signals do."""
