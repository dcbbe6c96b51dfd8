"""Media files: probing and decoding in a child process, sizes, writing. Torch-free."""
