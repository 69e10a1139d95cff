"""Operating system services: atomic file writing and signal handling."""
