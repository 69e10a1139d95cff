"""HDF5: datasets as sources and sinks."""
