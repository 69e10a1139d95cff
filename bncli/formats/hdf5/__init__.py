"""HDF5: datasets as sources and sinks, whatever wrote the file."""
